# make afternoon: does pretraining on film reviews raise the accuracy on SST-2?
#
# Six hours on two cores in float32. If interrupted, run the same command again: each step writes into
# FOLDER.part and renames it at the end, so a folder that exists is complete and is not made again.
# Pretraining writes directly into its folder and resumes from checkpoint.pt; its model/ comes last.
# For other data or settings, use another folder: make afternoon CORPUS=DIR AFTERNOON=runs/mine

# Hub ids, or folders of .txt, .jsonl or .parquet files: make afternoon CORPUS=DIR SST2=DIR
CORPUS ?= stanfordnlp/imdb
SST2 ?= stanfordnlp/sst2
AFTERNOON ?= runs/afternoon

PRETRAIN ?= --vocab-size 8192 --size mini --max-seq-length 64 --batch-size 64 --dropout 0 \
	--optimizer muon --learning-rate 1e-3 --warmup-steps 400 --steps 15000
FINE_TUNE ?= --learning-rate 1e-4 3e-4 --seeds 3
FROM_PRETRAINED = --weights $(AFTERNOON)/pretrain/model
FROM_SCRATCH = --tokenizer $(AFTERNOON)/pretrain/model --size mini --max-seq-length 64

# Of the labeled sentences: one in how many is trained on, and for how many epochs.
EVERY_all = 1
EVERY_tenth = 10
EVERY_hundredth = 100
EPOCHS_all = 2
EPOCHS_tenth = 6
EPOCHS_hundredth = 30

RUNS = $(foreach start,pretrained scratch,$(foreach share,all tenth hundredth,$(start)-$(share)))
MODEL = $(AFTERNOON)/pretrain/model/config.json

.SECONDARY:  # no file that is made on the way is deleted

# Fine-tuning has batches too small for several cores, so as many runs as there are cores go on at
# the same time, each with one thread and a log.
.PHONY: afternoon
afternoon: $(VENV)/ready
	$(MAKE) $(MODEL)
	$(MAKE) -j $$(getconf _NPROCESSORS_ONLN) $(RUNS:%=$(AFTERNOON)/%/metrics.jsonl)
	$(BIN)/python -m experiments.afternoon $(AFTERNOON)

$(AFTERNOON)/reviews/train.parquet:
	rm -rf $(@D).part
	$(BIN)/python -m experiments.prepare reviews "$(CORPUS)" $(@D).part
	mv $(@D).part $(@D)

$(MODEL): | $(AFTERNOON)/reviews/train.parquet
	$(BIN)/python train_pretrain.py --dataset $(AFTERNOON)/reviews $(PRETRAIN) \
		--out $(AFTERNOON)/pretrain $$(test -e $(AFTERNOON)/pretrain/checkpoint.pt && echo --resume)

$(AFTERNOON)/sst2-%/train.parquet:
	rm -rf $(@D).part
	$(BIN)/python -m experiments.prepare fewer "$(SST2)" $(EVERY_$*) $(@D).part
	mv $(@D).part $(@D)

define fine_tune
	rm -rf $(@D).part
	OMP_NUM_THREADS=1 $(BIN)/python train_sst2.py --dataset $(AFTERNOON)/sst2-$* $(1) \
		$(FINE_TUNE) --epochs $(EPOCHS_$*) --out $(@D).part > $(@D).log 2>&1
	mv $(@D).part $(@D)
endef

$(AFTERNOON)/pretrained-%/metrics.jsonl: | $(MODEL) $(AFTERNOON)/sst2-%/train.parquet
	$(call fine_tune,$(FROM_PRETRAINED))

$(AFTERNOON)/scratch-%/metrics.jsonl: | $(MODEL) $(AFTERNOON)/sst2-%/train.parquet
	$(call fine_tune,$(FROM_SCRATCH))
