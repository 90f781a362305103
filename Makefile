# make run | afternoon | test | bench | lint | wheel: each sets up a venv, given python3 with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/sample
# The whole of `make run` in a few seconds, as CI does it: make run STEPS=20 EPOCHS=1 SEEDS=1
STEPS ?= 3000
EPOCHS ?= 10
SEEDS ?= 3
FINE = --learning-rate 5e-4 --epochs $(EPOCHS) --seeds $(SEEDS)

.PHONY: run test bench lint wheel clean

run: $(VENV)/ready
	rm -rf "$(RUN)/pretrain" "$(RUN)/pretrained" "$(RUN)/scratch"
	$(BIN)/python train_pretrain.py --steps $(STEPS) --max-seq-length 48 --batch-size 64 --learning-rate 2e-3 --eval-every 50 --dropout 0 --out "$(RUN)/pretrain"
	$(BIN)/python bert.py "$(RUN)/pretrain/model" "The plot is wonderfully [MASK] and the [MASK] looks sublime."
	$(BIN)/python bert.py "$(RUN)/pretrain/model" "The plot is painfully [MASK] and the [MASK] looks tedious."
	$(BIN)/python train_sst2.py --weights "$(RUN)/pretrain/model" $(FINE) --out "$(RUN)/pretrained"
	$(BIN)/python train_sst2.py --tokenizer "$(RUN)/pretrain/model" --max-seq-length 48 $(FINE) --out "$(RUN)/scratch"
	$(BIN)/python train_sst2.py --weights "$(RUN)/pretrained/model" --predict "The plot is delicate and the canyon looks tender." "What about the canyon? That is murky, dear listeners."
	$(BIN)/python -m experiments.story "$(RUN)"

include experiments/afternoon.mk  # make afternoon

# Two processes share the tests. With one thread each, they do not wait for one another.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(VENV)/ready
	$(BIN)/python -m experiments.speed

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What `pip install .` gives in an empty environment works in any folder.
wheel:
	rm -rf runs/wheel build
	$(PYTHON) -m venv runs/wheel
	runs/wheel/bin/pip install --quiet --constraint constraints.txt .
	cd runs/wheel && bin/python -m train_pretrain --steps 2

$(VENV)/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,plot]"
	touch $@

clean:
	rm -rf $(VENV) "$(RUN)" *.egg-info
