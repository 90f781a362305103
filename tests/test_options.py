"""What a run can be told: precision, dropout, exports, splits, positions, evaluation alone."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategies import LETTERS, small_tokenizer
from test_training import some_batches

import data
import support.devices
import support.run
import train_pretrain
import train_sst2
from bert import BertConfig, BertPretrainModel, SST2BertModel
from support.curves import read_lines
from support.command_line import parse_options
from support.devices import choose_precision
from train_pretrain import PretrainOptions, pretrain, to_device
from train_sst2 import SST2Options

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Two splits whose documents tell where they are from: one has the letters a to m only."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "data").mkdir()  # where `datasets` takes any name before the hyphen for a split
    splits = {"train": LETTERS[:13], "unsupervised": LETTERS[13:]}
    for split, letters in splits.items():
        texts = ["\n\n".join(f"{a} {b} {a} {a} {b}" for b in letters) for a in letters]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"data/{split}-00000-of-00001.jsonl").write_text(rows)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture
def options(corpus, tmp_path) -> PretrainOptions:
    return PretrainOptions(
        out=str(tmp_path / "run"), dataset=corpus, tokenizer=corpus, max_seq_length=16,
        batch_size=2, steps=4, eval_every=4, eval_batches=1, log_every=1, save_every=2, workers=0,
        device="cpu",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _float32_again():
    yield
    torch.set_float32_matmul_precision("highest")


# ---- Precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "device", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "cpu", "medium"),
        ({"amx_bf16": False, "avx512_bf16": True}, "cpu", "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": False}, "cpu", "float32"),
        ({}, "cpu", "float32"),
        ({"amx_bf16": True}, "cuda", "bfloat16"),
    ],
)
def test_auto_is_the_fastest_precision_of_the_device(capabilities, device, expected, monkeypatch):
    monkeypatch.setattr(support.devices, "cpu_capabilities", lambda: capabilities)
    assert choose_precision("auto", torch.device(device)) == expected


def test_a_torch_that_cannot_tell_its_cpu_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert support.devices.cpu_capabilities() == {}
    assert choose_precision("auto", CPU) == "float32"


@pytest.mark.parametrize(
    ("precision", "products"),
    [("float32", "highest"), ("medium", "medium"), ("bfloat16", "highest")],
)
def test_a_precision_sets_how_torch_multiplies(precision, products):
    """And takes back what another run in this process has set."""
    torch.set_float32_matmul_precision("high")
    assert choose_precision(precision, CPU) == precision
    assert torch.get_float32_matmul_precision() == products


def products_of(precision: str) -> set[torch.dtype]:
    """Returns the types of what comes out of the layers of a forward pass of pretraining."""
    config = BertConfig.named("tiny", vocab_size=60, max_seq_length=40)
    model = BertPretrainModel(config, 0)
    found: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
    (batch,) = some_batches(1)
    for logits in train_pretrain.forward(model, to_device(batch, CPU), precision):
        assert logits.dtype == torch.float32
    return found


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("medium", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_bfloat16_is_the_type_of_all_products_and_of_no_logits(precision, dtype):
    assert products_of(precision) == {dtype}


def test_fine_tuning_obeys_the_precision():
    config = BertConfig.named("tiny", vocab_size=60, max_seq_length=16)
    model = SST2BertModel(config, 0).eval()
    input_ids = torch.arange(5, 15)[None]
    exact, rounded = (train_sst2.forward(model, input_ids, p) for p in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)


def test_weights_and_gradients_stay_float32(options):
    pretrain(replace(options, precision="bfloat16"))
    newest = sorted(Path(options.out, "checkpoints").iterdir())[-1]
    checkpoint = torch.load(newest, weights_only=True)
    moments = [state["exp_avg"] for state in checkpoint["optimizer"]["state"].values()]
    assert {tensor.dtype for tensor in [*checkpoint["model"].values(), *moments]} == {torch.float32}


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_the_precision_is_resolved_printed_and_kept(precision, options, monkeypatch, capsys):
    """In config.json and in what a resumed run must share: auto may mean another one elsewhere."""
    monkeypatch.setattr(support.devices, "cpu_capabilities", lambda: {"avx512_bf16": True})
    pretrain(replace(options, precision=precision))
    assert "precision bfloat16, dropout 0.1\n" in capsys.readouterr().out
    assert json.loads(Path(options.out, "config.json").read_text())["precision"] == "bfloat16"
    monkeypatch.setattr(support.devices, "cpu_capabilities", dict)
    with pytest.raises(ValueError, match="has precision bfloat16, not float32"):
        pretrain(replace(options, precision="auto", resume=True))


# ---- Dropout ------------------------------------------------------------------------------------


def dropouts(model) -> set[float]:
    hidden = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    return hidden | {model.config.dropout, model.config.attention_dropout}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_set_for_new_and_for_loaded_models(dropout, options):
    options = replace(options, dropout=dropout)
    new = train_pretrain.make_model(options, small_tokenizer())
    assert dropouts(new) == {dropout}
    new.save_pretrained(options.out, small_tokenizer())
    loaded = train_pretrain.make_model(
        replace(options, weights=options.out, dropout=0.2), small_tokenizer()
    )
    assert dropouts(loaded) == {0.2}


def test_fine_tuning_has_dropout_whatever_the_weights_had(tmp_path):
    """A model that was pretrained without it would be fine-tuned without, in silence."""
    config = BertConfig.named(
        "tiny", vocab_size=small_tokenizer().get_vocab_size(), dropout=0.0, attention_dropout=0.0
    )
    BertPretrainModel(config, 0).save_pretrained(tmp_path, small_tokenizer())
    fine_tuned = SST2Options(weights=str(tmp_path))
    assert dropouts(train_sst2.make_model(fine_tuned, small_tokenizer())) == {0.1}
    told = replace(fine_tuned, dropout=0.0)
    assert dropouts(train_sst2.make_model(told, small_tokenizer())) == {0.0}
    scratch = SST2Options(dropout=0.2)
    assert dropouts(train_sst2.make_model(scratch, small_tokenizer())) == {0.2}


def test_a_dropout_of_one_is_rejected(options):
    with pytest.raises(ValueError, match="--dropout must be at most 0.99, got 1.0"):
        pretrain(replace(options, dropout=1.0))


# ---- Exports ------------------------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return BertPretrainModel.from_pretrained(folder).state_dict()


def test_exports_are_the_models_of_their_steps(options):
    """As checkpoints have them; the last one is model/, and each has its tokenizer."""
    pretrain(replace(options, export_steps=(0, 2, 4)))
    out = Path(options.out)
    assert {path.name for path in (out / "models").iterdir()} == {"step-0", "step-2", "step-4"}
    for step, checkpoint in ((2, "step-000000002.pt"), (4, "step-000000004.pt")):
        expected = torch.load(out / "checkpoints" / checkpoint, weights_only=True)["model"]
        found = weights_of(out / f"models/step-{step}")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    last = weights_of(out / "model")
    assert all(torch.equal(last[k], v) for k, v in weights_of(out / "models/step-4").items())
    assert not torch.equal(last["mlm_bias"], weights_of(out / "models/step-0")["mlm_bias"])
    tokenizer = data.load_tokenizer(out / "models/step-2")
    assert tokenizer.get_vocab() == small_tokenizer().get_vocab()


def test_a_run_that_is_stopped_exports_its_model(options, monkeypatch):
    asked = iter([False, False, False, True])
    monkeypatch.setattr(support.run.Run, "asked_to_stop", lambda run: next(asked))
    with pytest.raises(SystemExit):
        pretrain(options)
    (exported,) = Path(options.out, "models").iterdir()
    assert exported.name == "step-3"
    newest = Path(options.out, "checkpoints/step-000000003.pt")
    expected = torch.load(newest, weights_only=True)["model"]
    assert torch.equal(weights_of(exported)["nsp.weight"], expected["nsp.weight"])


def test_exports_change_nothing_of_a_run_and_may_change_when_it_is_resumed(options, tmp_path):
    pretrain(options)
    other = replace(options, out=str(tmp_path / "other"))
    pretrain(replace(other, export_steps=(1, 3)))
    for name, tensor in weights_of(Path(options.out, "model")).items():
        assert torch.equal(tensor, weights_of(Path(other.out, "model"))[name])
    pretrain(replace(other, export_steps=(4,), resume=True))
    assert Path(other.out, "models/step-4").exists()


def test_an_export_after_the_last_step_is_rejected(options):
    with pytest.raises(ValueError, match="--export-steps 5 comes after the last of --steps 4"):
        pretrain(replace(options, export_steps=(2, 5)))
    assert not Path(options.out).exists()


# ---- Splits -------------------------------------------------------------------------------------


def letters_of(corpus: data.TokenizedCorpus) -> set[str]:
    tokens = {int(token) for chunk in corpus.chunks for token in chunk}
    return {small_tokenizer().id_to_token(token) for token in tokens}


@pytest.mark.parametrize(
    ("train_split", "letters"),
    [
        ("train", LETTERS[:13]),
        ("unsupervised", LETTERS[13:]),
        ("train+unsupervised", LETTERS),
        ("train[:50%]+unsupervised", LETTERS),
    ],
)
def test_several_splits_make_one_corpus(train_split, letters, corpus):
    """Without a validation split, its last documents are held out."""
    train, validation = (
        data.get_corpus(corpus, split, small_tokenizer(), train_split=train_split)
        for split in ("train", "validation")
    )
    assert letters_of(train) == set(letters)
    assert letters_of(validation) <= set(letters)
    documents = len(letters) if "%" not in train_split else 6 + 13
    assert len(train.document_starts) + len(validation.document_starts) - 2 == documents


def test_a_validation_split_stays_out_of_the_corpus_unless_it_is_named(tmp_path):
    for split, letters in (("train", "abcd"), ("validation", "wxyz")):
        rows = [json.dumps({"text": f"{a} a\n\n{a} b\n\n{a} c"}) for a in letters]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))

    def documents(split: str, train_split: str) -> int:
        corpus = data.get_corpus(str(tmp_path), split, small_tokenizer(), train_split=train_split)
        return len(corpus.document_starts) - 1

    assert documents("train", "train") == documents("validation", "train") == 4
    assert documents("train", "train+validation") == 6
    assert documents("validation", "train+validation") == 2


def test_a_split_that_is_not_there_is_named_with_those_that_are(corpus, options):
    with pytest.raises(ValueError, match="no split test, only train, unsupervised; see --split"):
        data.get_corpus(corpus, "train", small_tokenizer(), train_split="test")
    for split in ("test", "train+unsupervised"):
        with pytest.raises(
            ValueError, match=r"reads one whole split .*train, unsupervised; --split"
        ):
            pretrain(replace(options, streaming=True, split=split))


def test_the_split_is_trained_on_and_the_tokenizer_learned_from_it(options):
    """Of the split with the letters n to z, no other letter becomes a token."""
    told = replace(options, split="unsupervised", tokenizer=None, vocab_size=60)
    pretrain(told)
    vocabulary = data.load_tokenizer(Path(options.out) / "model").get_vocab()
    assert {token for token in vocabulary if token.isalpha() and len(token) == 1} == set(
        LETTERS[13:]
    )
    with pytest.raises(ValueError, match=r"has split unsupervised, not train"):
        pretrain(replace(told, split="train", resume=True))


# ---- Positions: first short pairs, then long ones -----------------------------------------------


def test_the_position_table_has_as_many_rows_as_asked_for(options):
    model = train_pretrain.make_model(replace(options, positions=40), small_tokenizer())
    assert model.config.max_seq_length == 40
    assert model.bert.embeddings.position.weight.shape == (40, 128)
    assert train_pretrain.make_model(options, small_tokenizer()).config.max_seq_length == 16


def test_the_papers_two_phases_train_one_model_on_short_and_then_on_long_pairs(options, tmp_path):
    """In miniature: 16 tokens, then 40. Only the second phase changes what the later positions know
    by more than weight decay, and it starts where the first one ended."""
    first = replace(options, positions=40, learning_rate=1e-2)
    pretrain(first)
    second = replace(
        options, out=str(tmp_path / "second"), weights=f"{first.out}/model", max_seq_length=40,
        learning_rate=1e-2,
    )  # fmt: skip
    pretrain(second)
    torch.manual_seed(options.seed)
    fresh = train_pretrain.make_model(first, small_tokenizer())
    tables = [fresh.bert.embeddings.position.weight.detach()]
    tables += [
        weights_of(Path(out, "model"))["bert.embeddings.position.weight"]
        for out in (first.out, second.out)
    ]
    learned = [(after - before).abs().mean(dim=1) for before, after in itertools.pairwise(tables)]
    assert learned[0][:10].min() > 1e-3
    assert learned[0][16:].max() < 1e-4
    assert learned[1][:30].min() > 1e-3
    lines = read_lines(Path(second.out), "validation")
    assert all(math.isfinite(loss) for loss in lines["mlm_loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 12}, "--max-seq-length 16 exceeds --positions 12"),
        ({"positions": 20, "weights": "W"}, "--positions 20, but the weights have 16"),
        (
            {"max_seq_length": 17, "weights": "W"},
            "--max-seq-length 17 exceeds the weights' 16 posi",
        ),
    ],
)
def test_positions_that_do_not_fit_are_rejected(changes, message, options):
    weights = Path(options.out).with_name("weights")
    train_pretrain.make_model(options, small_tokenizer()).save_pretrained(
        weights, small_tokenizer()
    )
    if "weights" in changes:
        changes = {**changes, "weights": str(weights)}
    with pytest.raises(ValueError, match=message):
        train_pretrain.make_model(replace(options, **changes), small_tokenizer())


# ---- Evaluation alone ---------------------------------------------------------------------------


def test_no_steps_evaluate_the_weights_and_write_nothing(options, tmp_path, capsys):
    """The same numbers as the run's own last evaluation."""
    pretrain(options)
    lines = read_lines(Path(options.out), "validation")
    capsys.readouterr()
    out = tmp_path / "nothing"
    pretrain(replace(options, weights=f"{options.out}/model", steps=0, out=str(out)))
    assert not out.exists()
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == f"{options.out}/model, 2 pairs of the validation split, float32"
    shown = {name: float(value) for name, value in map(str.split, rows)}
    names = {"mlm_loss", "perplexity", "mlm_accuracy", "nsp_loss", "nsp_accuracy"}
    assert names <= set(shown)
    for name, value in shown.items():
        assert value == pytest.approx(lines[name][-1], abs=5e-5)


def test_no_steps_need_weights(options):
    with pytest.raises(
        ValueError, match="--steps 0 evaluates a saved model: name it with --weights"
    ):
        pretrain(replace(options, steps=0))
    assert not Path(options.out).exists()


# ---- Lists --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (SST2Options, "--learning-rate"),
        (SST2Options, "--predict"),
        (PretrainOptions, "--export-steps"),
    ],
)
def test_a_list_without_a_value_is_rejected(options, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(options, [flag, "--seed", "1"])
    assert stopped.value.code == 2
    assert f"{flag} needs a" in capsys.readouterr().err


def test_no_learning_rate_at_all_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="--learning-rate needs a value"):
        train_sst2.main(SST2Options(out=str(tmp_path / "run"), learning_rate=()))
    assert not (tmp_path / "run").exists()
