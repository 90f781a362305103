"""The command lines: flags, help, and one clear message with exit status 2 for each mistake."""

import ast
import gc
import inspect
import io
import os
import pickle
import re
import signal
import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest
import torch
from helpers import ROOT, run_in_process
from strategies import LETTERS, VOCABULARY, write_mistakes, write_rows

import support.command_line
from bert import SIZES
from support.command_line import check_limits, parse_options, run_script
from support.processes import signals_to_handle
from train_pretrain import PretrainOptions, pretrain
from train_sst2 import SST2Options, main

MAINS = {"train_pretrain.py": (pretrain, PretrainOptions), "train_sst2.py": (main, SST2Options)}


# ---- Flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [PretrainOptions, SST2Options])
def test_without_flags_the_options_are_the_defaults(cls):
    assert parse_options(cls, []) == cls()


@dataclass
class Example:
    """What this script does."""

    some_number: int = 3
    """An integer."""
    maybe: str | None = None
    """A word."""
    rates: tuple[float, ...] = (0.5,)
    """Several rates."""
    size: Literal["a", "b"] = "a"
    """A choice."""
    flag: bool = False
    """A switch."""

    def __post_init__(self) -> None:
        check_limits(self, {"some_number": (2, 9), "rates": (0, 100)})


def test_every_kind_of_option_has_its_flag():
    line = "--some-number 4 --maybe x --rates 1 2.5 --size b --flag".split()
    options = asdict(parse_options(Example, line))
    assert options == {
        "some_number": 4,
        "maybe": "x",
        "rates": (1.0, 2.5),
        "size": "b",
        "flag": True,
    }


def unboxed(text: str) -> str:
    """Returns a message without the frame that tyro draws around it, and without line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--no-such-flag 1", "Unrecognized options: --no-such-flag"),
        ("--some 4", "Unrecognized options: --some"),
        ("--no-flag", "Unrecognized options: --no-flag"),
        ("--some-number 1", "--some-number must be at least 2, got 1"),
        ("--some-number 10", "--some-number must be at most 9, got 10"),
        (
            "--some-number x",
            "Error parsing --some-number: invalid literal for int()",
        ),
        ("--rates 1 -1", "--rates must be at least 0, got -1.0"),
        ("--rates nan", "--rates must be at least 0, got nan"),
        ("--rates inf", "--rates must be finite, got inf"),
        ("--size c", "invalid choice 'c' for argument '--size'"),
    ],
)
def test_a_wrong_flag_is_one_message_with_flag_and_value_and_exit_status_2(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(Example, line.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in unboxed(printed.err)
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("options", "line", "message"),
    [
        (PretrainOptions, "--seed -1", "--seed must be at least 0, got -1"),
        (
            PretrainOptions,
            "--seed 9223372036854775808",
            "--seed must be at most 9223372036854775807",
        ),
        (SST2Options, "--seed 9223372036854775807", "--seed must be at most 922337203685"),
        (SST2Options, "--seed -5", "--seed must be at least 0, got -5"),
        (
            PretrainOptions,
            "--max-seq-length 1000000000000",
            "--max-seq-length must be at most 1000000",
        ),
        (PretrainOptions, "--positions 1000000000000", "--positions must be at most 1000000"),
        (PretrainOptions, "--vocab-size 1000000000000", "--vocab-size must be at most 1000000"),
        (SST2Options, "--vocab-size 1000000000000", "--vocab-size must be at most 1000000"),
        (
            PretrainOptions,
            "--rows-per-document 1000000000000",
            "--rows-per-document must be at most",
        ),
        (PretrainOptions, "--batch-size 1000000000000", "--batch-size must be at most 1000000"),
        (SST2Options, "--max-seq-length 1000000000000", "--max-seq-length must be at most 1000000"),
    ],
)
def test_numbers_that_would_overflow_are_rejected(options, line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(options, line.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "flag", "smallest"),
    [
        (PretrainOptions, "--steps", 0),
        (PretrainOptions, "--max-seq-length", 5),  # [CLS] a [SEP] b [SEP]
        (PretrainOptions, "--batch-size", 1),
        (PretrainOptions, "--accumulate", 1),
        (PretrainOptions, "--workers", 0),
        (PretrainOptions, "--log-every", 1),
        (PretrainOptions, "--eval-every", 1),
        (PretrainOptions, "--eval-batches", 1),
        (PretrainOptions, "--save-every", 1),
        (PretrainOptions, "--rows-per-document", 1),
        (PretrainOptions, "--positions", 1),
        (PretrainOptions, "--vocab-size", 1),
        (PretrainOptions, "--warmup-steps", 0),
        (PretrainOptions, "--export-steps", 0),
        (PretrainOptions, "--dropout", 0),
        (PretrainOptions, "--learning-rate", 0),
        (SST2Options, "--seeds", 1),
        (SST2Options, "--vocab-size", 1),
        (SST2Options, "--max-seq-length", 3),  # [CLS] a [SEP]
        (SST2Options, "--batch-size", 1),
        (SST2Options, "--epochs", 1),
        (SST2Options, "--log-every", 1),
        (SST2Options, "--dropout", 0),
        (SST2Options, "--learning-rate", 0),
    ],
)
def test_the_smallest_value_is_accepted_and_one_below_it_is_rejected(
    options, flag, smallest, capsys
):
    parse_options(options, ["--weights", "W", flag, str(smallest)])
    with pytest.raises(SystemExit):
        parse_options(options, ["--weights", "W", flag, str(smallest - 1)])
    assert f"{flag} must be at least {smallest}, got" in unboxed(capsys.readouterr().err)


def test_the_defaults_change_only_on_purpose():
    """Those of fine-tuning are among the values that [BERT] A.3 tries: batch size, learning rate,
    epochs."""
    pretraining, fine_tuning = PretrainOptions(), SST2Options()
    for options in (pretraining, fine_tuning):
        assert (options.device, options.precision) == (None, "auto")
        assert options.batch_size == 32
    assert (fine_tuning.epochs, fine_tuning.learning_rate) == (3, (5e-5,))
    assert (fine_tuning.out, fine_tuning.log_every) == ("runs/sst2", 50)
    assert (pretraining.out, pretraining.steps) == ("runs/pretrain", 4000)
    assert (pretraining.max_seq_length, pretraining.workers) == (64, 2)
    assert (pretraining.eval_every, pretraining.eval_batches) == (250, 16)
    assert (pretraining.log_every, pretraining.save_every) == (10, 500)
    assert (pretraining.compile, pretraining.checkpoint_activations) == (False, False)


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


@pytest.mark.parametrize("cls", [PretrainOptions, SST2Options])
def test_an_empty_option_is_rejected_by_its_name(cls):
    """It is a variable of the shell that is not set: --weights "$MODEL" trained from scratch."""
    texts = [field.name for field in fields(cls) if field.type in (str, str | None)]
    assert {"out", "dataset", "weights", "tokenizer", "device"} <= set(texts)
    for name in texts:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is empty"):
            cls(**{name: ""})


def test_a_dropout_of_one_is_rejected(options):
    with pytest.raises(ValueError, match="--dropout must be at most 0.99, got 1.0"):
        pretrain(replace(options, dropout=1.0))


def test_a_warmup_longer_than_the_run_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="--warmup-steps 9 is more than --steps 8"):
        pretrain(PretrainOptions(out=str(tmp_path / "run"), steps=8, warmup_steps=9))
    assert not (tmp_path / "run").exists()


# ---- Help ---------------------------------------------------------------------------------------


def field_docstrings(cls: type) -> dict[str, str]:
    """Returns the string under each field of a dataclass, from its source."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


@pytest.mark.parametrize("cls", [PretrainOptions, SST2Options])
def test_help_explains_every_flag(cls, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(cls, ["--help"])
    assert stopped.value.code == 0
    shown = unboxed(capsys.readouterr().out)
    explained = field_docstrings(cls)
    assert explained.keys() == cls.__dataclass_fields__.keys()
    for name, text in explained.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert text in shown


@pytest.mark.parametrize("cls", [PretrainOptions, SST2Options])
def test_the_sizes_to_choose_from_are_the_published_ones(cls):
    assert set(get_args(get_type_hints(cls)["size"])) == SIZES.keys()


# ---- Mistakes, as a person would make them ------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_mistakes(tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("train_pretrain.py", "--dataset body.jsonl", "no --text-column text in ['body']"),
        (
            "train_pretrain.py",
            "--dataset one.jsonl --vocab-size 60",
            "one.jsonl has 1 documents of",
        ),
        ("train_pretrain.py", "--dataset lines.jsonl --vocab-size 60", "needs --rows-per-document"),
        ("train_pretrain.py", "--dataset nothing", "cannot read nothing: "),
        ("train_pretrain.py", "--dataset empty.jsonl", "cannot read empty.jsonl: it is empty"),
        (
            "train_pretrain.py",
            "--dataset numbers.jsonl",
            "--text-column text is not text but Value",
        ),
        (
            "train_pretrain.py",
            "--dataset numbers.jsonl --tokenizer vocab.txt --workers 0",
            "row 0: text is int, not text",
        ),
        ("train_pretrain.py", "--dataset nulls.jsonl", "nulls.jsonl has 0 documents of"),
        (
            "train_pretrain.py",
            "--dataset latin.jsonl",
            "--dataset latin.jsonl has a text that is not",
        ),
        ("train_pretrain.py", "--dataset latin.txt", "cannot read latin.txt: 'utf-8' codec can't"),
        (
            "train_pretrain.py",
            "--dataset corpus.jsonl --weights few",
            "the tokenizer has ids beyond the weights' 20",
        ),
        (
            "train_pretrain.py",
            "--dataset corpus.jsonl --weights bare",
            "no BERT can be read from bare",
        ),
        ("train_pretrain.py", "--device foo", "--device foo is not cpu, cuda or cuda:0"),
        (
            "train_pretrain.py",
            "--dataset corpus.jsonl --vocab-size 60 --learning-rate 1e30 --steps 2 --out nan",
            "step 1: the gradient was not finite, so it was skipped; the last checkpoint is good",
        ),
        ("train_pretrain.py", "--learning-rate nan", "--learning-rate must be at least 0, got nan"),
        ("train_pretrain.py", "--learning-rate inf", "--learning-rate must be finite, got inf"),
        (
            "train_sst2.py",
            "--learning-rate 1e-3 inf",
            "--learning-rate must be finite, got inf",
        ),
        (
            "train_pretrain.py",
            "--dataset corpus.jsonl --streaming",
            "--streaming needs a --tokenizer",
        ),
        (
            "train_pretrain.py",
            "--dataset body.jsonl --streaming --tokenizer vocab.txt",
            "no --text-column text in the first row of body.jsonl: ['body']",
        ),
        (
            "train_pretrain.py",
            "--dataset one.jsonl --streaming --tokenizer vocab.txt",
            "one.jsonl has 0 documents to evaluate on, and 2 are needed",
        ),
        ("train_pretrain.py", "--dataset broken.jsonl", "cannot read broken.jsonl"),
        (
            "train_pretrain.py",
            "--dataset corpus.jsonl --vocab-size 9",
            "--vocab-size 9: the special tokens and",
        ),
        ("train_pretrain.py", "--tokenizer nomask.txt", "lacks [MASK]"),
        ("train_pretrain.py", "--tokenizer none.txt", "no tokenizer at none.txt"),
        ("train_pretrain.py", "--max-seq-length 4", "--max-seq-length must be at least 5, got 4"),
        (
            "train_pretrain.py",
            "--dataset corpus.jsonl --weights model --max-seq-length 17",
            "--max-seq-length 17 exceeds the weights' 16 positions",
        ),
        ("train_pretrain.py", "--weights corpus.jsonl", "corpus.jsonl is not a directory"),
        ("train_pretrain.py", "--size huge", "invalid choice 'huge' for argument '--size'"),
        ("train_pretrain.py", "--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("train_pretrain.py", "--workers -1", "--workers must be at least 0, got -1"),
        ("train_pretrain.py", "--bathc-size 8", "Unrecognized options: --bathc-size"),
        ("train_pretrain.py", "--out taken", "--out taken holds another run; name a new folder"),
        ("train_pretrain.py", "--device cuda:9", "--device cuda:9"),
        ("train_sst2.py", "--dataset nothing/at/all", "nothing/at/all does not exist"),
        ("train_sst2.py", "--dataset corpus.jsonl", "no columns sentence (or text) and label"),
        ("train_sst2.py", "--dataset labels.jsonl", "train: row 0 has the label -1, not 0 or 1"),
        ("train_sst2.py", "--dataset two.jsonl", "train: row 0 has the label 2, not 0 or 1"),
        ("train_sst2.py", "--dataset words.jsonl", "train: row 0 has the label 'positive', not"),
        (
            "train_sst2.py",
            "--dataset wordless.jsonl",
            "wordless.jsonl, train: row 1 has the sentence None, which is no text",
        ),
        (
            "train_sst2.py",
            "--weights model --max-seq-length 17",
            "--max-seq-length 17: the weights have 16 positions",
        ),
        ("train_sst2.py", "--predict hello", "--predict needs --weights"),
        (
            "train_sst2.py",
            "--test-dataset latin_test",
            "--dataset sample or --test-dataset latin_test has a text that is not UTF-8",
        ),
    ],
)
def test_a_mistake_ends_in_one_clear_line_and_status_2(
    folder, script, line, message, capfd, monkeypatch
):
    """The line says what was wrong and which flag to change; nothing is overwritten."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        run_script(*MAINS[script], line.split())
    assert stopped.value.code == 2
    printed = capfd.readouterr().err
    own_messages = [line for line in printed.splitlines() if line.startswith("error: ")]
    tyros_messages = printed.count("For full helptext")  # of options, with the line's own script
    assert len(own_messages) + tyros_messages == 1
    assert message in unboxed(own_messages[0] if own_messages else printed)
    assert (folder / "taken/metrics.jsonl").read_text() == "a run\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("train_pretrain.py", "--dataset no/such/file", "no/such/file does not exist"),
        ("train_sst2.py", "--weights a//b --predict hello", "a//b is not a directory"),
    ],
)
def test_a_person_sees_no_traceback(folder, script, line, message, tmp_path):
    line = (str(ROOT / script), *line.split())
    status, printed = run_in_process(tmp_path / "output", *line, cwd=folder)
    assert status == 2
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_a_line_of_50_megabytes_empty_rows_and_nulls_are_no_mistake(tmp_path, capsys):
    """They are read, and documents without a next sentence are counted."""
    long = ("😀" * 8 + ". ") * 500_000  # json writes 12 bytes for each
    rows = [{"text": long}, {"text": None}, {"text": ""}, {"text": "ab"}]
    rows += [{"text": f"{c} aa bb. cc dd. ee ff."} for c in LETTERS]
    file = write_rows(tmp_path / "corpus.jsonl", rows)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    options = {"dataset": file, "tokenizer": str(tmp_path / "vocab.txt"), "workers": 0}
    pretrain(PretrainOptions(out=str(tmp_path / "run"), steps=1, **options))
    out = capsys.readouterr().out
    assert "train: 25 documents, 1,000,384 tokens" in out
    assert "documents left out: {'no sentence': 2, 'one sentence': 1}" in out


# ---- Signals, errors of data workers, and our own -----------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("raises_another_error", [False, True])
def test_a_signal_ends_a_script_and_what_it_has_forked_with_its_status_and_no_message(
    number, raises_another_error, capfd
):
    """A library that waits for a process may turn the end of it into an error of its own."""
    statuses = []

    def tokenize(_) -> None:
        process = os.fork()
        if not process:
            try:
                os.kill(os.getpid(), number)
            finally:  # not reached: the signal ends the process
                os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        try:
            os.kill(os.getpid(), number)
        except SystemExit as error:
            raise (RuntimeError("a process died") if raises_another_error else error) from None

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run_script(tokenize, PretrainOptions, [])
    assert (statuses, ended.value.code) == ([128 + number], 128 + number)
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(number) == before


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise (IndexError if index else ValueError)("a mistake\nof two lines")

    def __len__(self):
        return 2


@pytest.mark.slow
def test_an_error_in_a_data_worker_is_reported_as_in_the_main_process(capsys, monkeypatch):
    """A user's mistake becomes one line; our own keeps its traceback."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # not 5 s
    loader = torch.utils.data.DataLoader(Broken(), sampler=[1], num_workers=1)
    with pytest.raises(IndexError, match="a mistake"):
        support.command_line.run_script(lambda _: list(loader), PretrainOptions, [])
    loader = torch.utils.data.DataLoader(Broken(), sampler=[0], num_workers=1)
    with pytest.raises(SystemExit):
        support.command_line.run_script(lambda _: list(loader), PretrainOptions, [])
    assert capsys.readouterr().err == "error: a mistake\nof two lines\n"
    loader = None
    gc.collect()  # the workers end here, and not in another test


def test_a_signal_that_the_caller_ignores_stays_ignored():
    """nohup ignores SIGHUP, and a shell ignores Ctrl-C for what it starts in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_script(lambda _: os.kill(os.getpid(), signal.SIGHUP), PretrainOptions, [])
        assert signals_to_handle() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_text_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    """A ± ended a run of fine-tuning after its first learning rate."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    run_script(lambda _: print("0.5 ± 0.1"), PretrainOptions, [])
    assert shown.getvalue() == b"0.5 \\xb1 0.1\n"


def test_closed_streams_hide_the_bar_and_end_nothing(options, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    run_script(lambda _: pretrain(options), PretrainOptions, [])
    assert (Path(options.out) / "model").exists()


def test_a_mistake_that_a_worker_passes_on_is_shown_without_its_traceback(capsys):
    def pass_on(_) -> None:
        try:
            raise ValueError("a mistake\nof two lines")
        except ValueError:
            where = "in DataLoader worker process 0"
            torch._utils.ExceptionWrapper(where=where).reraise()

    with pytest.raises(SystemExit):
        support.command_line.run_script(pass_on, PretrainOptions, [])
    assert capsys.readouterr().err == "error: a mistake\nof two lines\n"


def test_a_worker_that_torch_says_is_killed_is_reported(capsys):
    def told_by_torch(_) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    with pytest.raises(SystemExit):
        support.command_line.run_script(told_by_torch, PretrainOptions, [])
    cause = "DataLoader worker (pid 1) is killed by signal: Killed"
    assert capsys.readouterr().err == (
        f"error: a DataLoader worker died ({cause}). Out of memory? Try fewer --workers, and"
        " --resume\n"
    )


def read_from_worker(error: Exception) -> None:
    def _try_get_data():
        raise error

    _try_get_data()


@pytest.mark.parametrize(
    "error",
    [
        EOFError(),
        ConnectionResetError("reset"),
        pickle.UnpicklingError("pickle data was truncated"),
        RuntimeError("received 0 items of ancdata"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_dead_worker_breaks_is_reported_as_its_death(error, monkeypatch, capsys):
    """Torch's signal handler, which raises, may run while the death is being reported."""

    def signalled(signal_number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def lose_a_worker(_) -> None:
        signal.signal(signal.SIGCHLD, signalled)  # not earlier: processes of other tests may end
        read_from_worker(error)

    before, fail = signal.getsignal(signal.SIGCHLD), support.command_line.fail
    monkeypatch.setattr(
        support.command_line,
        "fail",
        lambda text: (os.kill(os.getpid(), signal.SIGCHLD), fail(text)),
    )
    with pytest.raises(SystemExit) as ended:
        support.command_line.run_script(lose_a_worker, PretrainOptions, [])
    signal.signal(signal.SIGCHLD, before)
    assert ended.value.code == 2
    cause = str(error) or "end of its messages"
    assert f"error: a DataLoader worker died ({cause}). Out of memory?" in capsys.readouterr().err


def test_our_own_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        support.command_line.run_script(
            lambda _: torch.ones(2, 3) @ torch.ones(2, 3), PretrainOptions, []
        )
