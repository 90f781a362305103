"""`make afternoon`: the commands are understood, what is
finished is not run again, and the tables are computed from the lines of the runs.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from helpers import ROOT, start, wait
from strategies import write_rows

import data
from experiments import afternoon
from experiments.afternoon import Stage, run_at_the_same_time, run_stage, stages
from experiments.clean_reviews import clean_reviews
from experiments.fewer_labels import fewer_labels
from support.command_line import parse_options
from train_pretrain import PretrainOptions
from train_sst2 import SST2Options

SCRIPTS = {"train_pretrain.py": PretrainOptions, "train_sst2.py": SST2Options}


# ---- The commands -------------------------------------------------------------------------------


def test_every_training_command_of_the_afternoon_is_understood(tmp_path):
    one_by_one, together = stages("corpus", "sst2", tmp_path)
    options = [
        parse_options(SCRIPTS[stage.command[0]], [*stage.command[1:], str(stage.folder)])
        for stage in [*one_by_one, *together]
        if stage.command[0] in SCRIPTS
    ]
    assert len(options) == 7
    assert {Path(o.out).parent for o in options} == {tmp_path}
    assert len({o.out for o in options}) == 7


def test_pretrained_and_scratch_differ_in_nothing_but_the_weights(tmp_path):
    _, together = stages("corpus", "sst2", tmp_path)
    for with_weights, without in zip(together[::2], together[1::2], strict=True):
        pair = [
            vars(parse_options(SST2Options, [*stage.command[1:], "out"]))
            for stage in (with_weights, without)
        ]
        differing = {name for name in pair[0] if pair[0][name] != pair[1][name]}
        assert differing == {"weights", "tokenizer", "size", "max_seq_length"}
        assert pair[0]["weights"] == pair[1]["tokenizer"]
    (pretraining,) = (s for s in stages("corpus", "sst2", tmp_path)[0] if s.resumes)
    options = parse_options(PretrainOptions, [*pretraining.command[1:], "out"])
    assert (pair[1]["size"], pair[1]["max_seq_length"]) == (options.size, options.max_seq_length)


# ---- Running them -------------------------------------------------------------------------------


def writing(text: str, status: int = 0) -> list[str]:
    """Returns a command that adds a line to a file of its folder, and ends with a status."""
    code = f"""
import pathlib, sys
folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
with (folder / "log").open("a") as file: file.write("{text}\\n")
if len(sys.argv) > 2: (folder / "model").mkdir()
sys.exit({status})
"""
    return ["-c", code]


def test_a_finished_stage_is_not_run_again(tmp_path):
    stage = Stage(tmp_path / "a", writing("once"))
    for _ in range(2):
        run_stage(stage)
    assert (tmp_path / "a/log").read_text() == "once\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_afternoon_over_the_results_of_other_commands_is_rejected(tmp_path, monkeypatch):
    """With another corpus, the results of the one before were shown as new ones."""
    out = tmp_path / "out"

    def begin(out: Path, text: str) -> None:
        stage_list = [Stage(out / "a", writing(text))]
        monkeypatch.setattr(afternoon, "stages", lambda *_: (stage_list, []))
        afternoon.run("corpus", "sst2", out)

    begin(out, "before")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out was made by other commands than these"):
            begin(out, "after")
    out.rename(tmp_path / "moved")
    begin(tmp_path / "moved", "before")  # the same ones go on
    (tmp_path / "moved/commands.txt").unlink()  # a folder of an older version has none
    with pytest.raises(RuntimeError, match="it does not say which"):
        begin(tmp_path / "moved", "before")
    assert (tmp_path / "moved/a/log").read_text() == "before\n"


@contextlib.contextmanager
def held_by_another_process(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    code = """
import pathlib, sys
from support.folder import lock
with lock(pathlib.Path(sys.argv[1])): print("locked", flush=True); sys.stdin.read()
"""
    line = [sys.executable, "-c", code, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        yield
        process.communicate()


def test_a_second_afternoon_in_the_same_folder_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(afternoon, "stages", lambda *_: ([Stage(tmp_path / "a", ["-c", ""])], []))
    with (
        held_by_another_process(tmp_path),
        pytest.raises(SystemExit, match="in use by another process"),
    ):
        afternoon.main("corpus", "sst2", str(tmp_path))
    assert not (tmp_path / "commands.txt").exists()


def test_a_folder_that_a_command_still_writes_into_is_not_deleted(tmp_path):
    """The command may outlive the afternoon that started it, if that was killed."""
    unfinished = tmp_path / "a.unfinished"
    with (
        held_by_another_process(unfinished),
        pytest.raises(ValueError, match="a.unfinished is in use by another process"),
    ):
        run_stage(Stage(tmp_path / "a", writing("second")))
    assert unfinished.exists()


def test_an_empty_folder_of_checkpoints_is_started_anew(tmp_path):
    """It stays where the disk was full at the first checkpoint, and there is nothing to resume."""
    stage = Stage(
        tmp_path / "a", ["-c", "import sys; sys.exit('--resume' in sys.argv)"], resumes=True
    )
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    run_stage(stage)
    (tmp_path / "a/checkpoints/step-000000000.pt").touch()
    with pytest.raises(RuntimeError, match="this command failed"):
        run_stage(stage)


def test_make_hands_on_a_path_with_spaces_as_one_word():
    line = ["make", "-n", "run", "afternoon", "CORPUS=my reviews", "SST2=a b", "RUN=my runs"]
    printed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(command) for command in printed.splitlines()]
    assert ["rm", "-rf", "my runs"] in commands
    (started,) = (words for words in commands if "experiments.afternoon" in words)
    assert started[-3:] == ["my reviews", "a b", "runs/afternoon"]
    outs = [words[words.index("--out") + 1] for words in commands if "--out" in words]
    assert outs == ["my runs/pretrain", "my runs/pretrained", "my runs/scratch"]


def test_a_stage_that_failed_is_run_from_its_beginning(tmp_path):
    with pytest.raises(RuntimeError, match=f"failed, see {tmp_path}/a.log: -c"):
        run_stage(Stage(tmp_path / "a", writing("failed", status=3)), tmp_path / "a.log")
    assert not (tmp_path / "a").exists()
    run_stage(Stage(tmp_path / "a", writing("whole")))
    assert (tmp_path / "a/log").read_text() == "whole\n"


def test_a_stage_that_resumes_goes_on_in_its_folder(tmp_path):
    folder = tmp_path / "a"
    stage = Stage(folder, writing("after"), resumes=True)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/step-000000000.pt").touch()
    (folder / "log").write_text("before\n")
    for _ in range(2):  # the second time, it is finished
        run_stage(stage)
    assert (folder / "log").read_text() == "before\nafter\n"


def test_a_stage_with_a_core_of_its_own_has_one_thread_and_a_log(tmp_path):
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); os.mkdir(sys.argv[1])"
    run_stage(Stage(tmp_path / "a", ["-c", code]), tmp_path / "a.log")
    assert (tmp_path / "a.log").read_text() == "1\n"


def test_stages_run_in_order_and_a_failure_ends_the_afternoon(tmp_path, monkeypatch):
    """The second of the stages that run together fails; one that did not start never does."""
    need_first = f"import os, sys; os.stat('{tmp_path}/first'); os.mkdir(sys.argv[1])"
    together = [
        Stage(tmp_path / "second", ["-c", need_first]),
        Stage(tmp_path / "third", writing("", status=1)),
        *(Stage(tmp_path / f"late-{i}", ["-c", f"import time; time.sleep(1); {need_first}"])
          for i in range(6)),
    ]  # fmt: skip
    one_by_one = [Stage(tmp_path / "first", writing(""))]
    monkeypatch.setattr(afternoon, "stages", lambda *_: (one_by_one, together))
    monkeypatch.setattr(afternoon.os, "cpu_count", lambda: 2)
    with pytest.raises(SystemExit, match="this command failed, see .*third.log"):
        afternoon.main("corpus", "sst2", str(tmp_path))
    assert (tmp_path / "second").exists()
    assert not (tmp_path / "late-5").exists()


def test_the_stages_of_a_chain_run_one_after_the_other(tmp_path):
    slow = "import os, sys, time; time.sleep(0.5); os.mkdir(sys.argv[1])"
    need_slow = f"import os, sys; os.stat('{tmp_path}/slow'); os.mkdir(sys.argv[1])"
    chain = [Stage(tmp_path / "slow", ["-c", slow]), Stage(tmp_path / "last", ["-c", need_slow])]
    run_at_the_same_time([chain, [Stage(tmp_path / "other", ["-c", slow])]])
    assert all((tmp_path / name).exists() for name in ("slow", "last", "other"))


def test_no_other_stage_starts_once_one_has_failed(tmp_path, monkeypatch):
    """Of a chain that runs beside the one that fails, too."""
    monkeypatch.setattr(afternoon.os, "cpu_count", lambda: 2)
    late = "import os, sys, time; time.sleep(1); os.mkdir(sys.argv[1])"
    chain = [Stage(tmp_path / "running", ["-c", late]), Stage(tmp_path / "never", ["-c", late])]
    with pytest.raises(RuntimeError, match="this command failed"):
        run_at_the_same_time([chain, [Stage(tmp_path / "bad", ["-c", "import sys; sys.exit(3)"])]])
    assert (tmp_path / "running").exists()
    assert not (tmp_path / "never").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="File exists"):
            afternoon.main("corpus", "sst2", str(tmp_path / "file"))
    finally:
        signal.signal(signal.SIGTERM, before)


def in_a_group_of_its_own(folder: str, at_the_same_time: bool) -> None:
    """Runs an afternoon of one stage, as a terminal would: Ctrl-C reaches every process."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
folder = pathlib.Path(sys.argv[1]); folder.mkdir()
try: (folder / "started").touch(); time.sleep(60)
except KeyboardInterrupt: time.sleep(1); (folder / "saved").touch()
"""
    stage = Stage(Path(folder) / "a", ["-c", code], resumes=True)
    afternoon.stages = lambda *_: ([], [stage]) if at_the_same_time else ([stage], [])
    afternoon.main("corpus", "sst2", folder)


@pytest.mark.slow
@pytest.mark.parametrize("at_the_same_time", [False, True])
@pytest.mark.parametrize(
    ("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_a_signal_lets_the_running_command_save_and_says_how_to_go_on(
    send, number, at_the_same_time, tmp_path
):
    """Ctrl-C reaches the whole group, SIGTERM the afternoon alone."""
    process = start(in_a_group_of_its_own, str(tmp_path), at_the_same_time, output=tmp_path / "log")
    while not (tmp_path / "a/started").exists():
        assert process.is_alive()
        time.sleep(0.05)
    send(process.pid, number)
    assert wait(process) == [1]
    assert (tmp_path / "a/saved").exists()
    last_line = (tmp_path / "log").read_text().splitlines()[-1]
    assert last_line == "stopped; the same command goes on from here"


# ---- Data ---------------------------------------------------------------------------------------


def test_line_breaks_of_html_become_line_breaks_and_nothing_else_changes(tmp_path, monkeypatch):
    """The splits are those of IMDB; its labels and its test split are left out."""
    texts = {
        "train": "One.<br /><br />Two <b>is</b> here.",
        "test": "Four.",
        "unsupervised": "Three.",
    }
    splits = {
        name: datasets.Dataset.from_dict({"text": [text], "label": [0]})
        for name, text in texts.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(data, "get_dataset", lambda *_, **__: datasets.DatasetDict(splits))
        assert list(clean_reviews("imdb", str(tmp_path / "clean"))) == [
            {"split": "train", "reviews": 2}
        ]
    cleaned = data.get_dataset(str(tmp_path / "clean"), split=None)
    rows = [{"text": "One.\n\nTwo <b>is</b> here."}, {"text": "Three."}]
    assert {name: list(split) for name, split in cleaned.items()} == {"train": rows}
    assert data.split_sentences(rows[0]["text"]) == ["One.", "Two <b>is</b> here."]


def test_a_validation_split_of_reviews_is_kept(tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "raw" / f"{split}.jsonl", [{"text": f"{split}<br />"}])
    list(clean_reviews(str(tmp_path / "raw"), str(tmp_path / "clean")))
    cleaned = data.get_dataset(str(tmp_path / "clean"), split=None)
    assert {name: list(split["text"]) for name, split in cleaned.items()} == {
        "train": ["train\n"],
        "validation": ["validation\n"],
    }


def test_every_tenth_sentence_keeps_its_label_and_validation_stays_whole(tmp_path):
    sentences = [{"sentence": f"s {i}", "label": i % 2} for i in range(25)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "sst2" / f"{split}.jsonl", sentences)
    list(fewer_labels(str(tmp_path / "sst2"), "10", str(tmp_path / "tenth")))
    tenth = data.get_dataset(str(tmp_path / "tenth"), split=None)
    assert list(tenth["train"]) == [sentences[0], sentences[10], sentences[20]]
    assert list(tenth["validation"]) == sentences


# ---- What it has shown --------------------------------------------------------------------------


def write_accuracies(folder: Path, accuracies: dict[tuple[float, int], list[float]]) -> None:
    """Writes the validation lines of a run: by learning rate and seed, one for each epoch."""
    write_rows(
        folder / "metrics.jsonl",
        [
            {"split": "validation", "learning_rate": rate, "seed": seed, "accuracy": accuracy}
            for (rate, seed), of_epochs in accuracies.items()
            for accuracy in of_epochs
        ],
    )


def test_the_learning_rate_is_chosen_by_the_mean_of_the_seeds_and_not_by_the_best_one(tmp_path):
    lucky_seed = {(1e-4, 0): [0.5, 0.96], (1e-4, 1): [0.5, 0.5]}
    better_mean = {(3e-4, 0): [0.8, 0.5], (3e-4, 1): [0.7, 0.78]}
    write_accuracies(tmp_path, {**lucky_seed, **better_mean})
    assert afternoon.at_best_rate(tmp_path) == pytest.approx([80, 78])


def test_the_table_has_the_gain_of_each_share_in_points(tmp_path):
    for i, share in enumerate(afternoon.SHARES):
        write_accuracies(tmp_path / f"pretrained-{share}", {(1e-4, 0): [0.9], (1e-4, 1): [0.92]})
        write_accuracies(tmp_path / f"scratch-{share}", {(1e-4, 0): [0.8 + i / 50]})
    assert afternoon.gain_table(tmp_path)[2:] == [
        "| all | 91.0 ± 1.4% | 80.0% | +11.0 |",
        "| tenth | 91.0 ± 1.4% | 82.0% | +9.0 |",
        "| hundredth | 91.0 ± 1.4% | 84.0% | +7.0 |",
    ]


def test_the_expected_losses_are_those_of_the_steps_that_are_asked_for(tmp_path):
    validation = [
        {"split": "validation", "step": s, "tokens": s * 4000, "mlm_loss": 9 - s / 250,
         "nsp_accuracy": 0.5 + s / 5000}
        for s in (0, 250, 500)
    ]  # fmt: skip
    write_rows(tmp_path / "metrics.jsonl", validation)
    assert afternoon.loss_table(tmp_path, (250, 500))[2:] == [
        "| 250 | 1.0 | 8.00 | 55% |",
        "| 500 | 2.0 | 7.00 | 60% |",
    ]
