"""The documents say what is there, and no more: their commands, links, tests and numbers."""

import configparser
import importlib
import inspect
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench
from bert import SIZES, BertConfig
from experiments import afternoon, figures, story
from support.command_line import parse_options
from train_pretrain import PretrainOptions
from train_sst2 import SST2Options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Of the table of what to expect of `make afternoon`.
EXPECTED_STEPS = (250, 500, 1000, 1500, 2000, 2500, 5000, 7500, 10000, 15000)
LINKING = ["README.md", "CONTRIBUTING.md", "WALKTHROUGH.md", "tests/README.md", "tests/MUTANTS.md"]
LINKING += ["results/README.md", "benchmarks/README.md"]
NAMING = ["README.md", "tests/README.md", "tests/REGRESSIONS.md"]  # pages that name tests


def commands(page: str = "README.md") -> list[list[str]]:
    """Returns the indented lines of a page that start a program, words apart, continued lines
    joined.
    """
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    ((?:python|torchrun|make|[A-Z_]+=\w+ make|\.venv)\b.*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_every_training_command_of_the_readme_and_of_the_results_is_understood():
    """Each flag exists and takes its value; an ellipsis stands for other flags."""
    understood = 0
    for words in [*commands(), *commands("results/README.md")]:
        options = {"train_pretrain.py": PretrainOptions, "train_sst2.py": SST2Options}
        for script in options.keys() & set(words):
            flags = [word for word in words[words.index(script) + 1 :] if word != "..."]
            parse_options(options[script], flags)
            understood += 1
    assert understood >= 12


def test_every_other_command_of_the_readme_is_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for words in commands():
        for word, following in pairwise(words):
            if word == "make":
                assert following in targets
            if following.endswith(".py"):
                assert (ROOT / following).exists()


def experiment_commands() -> list[list[str]]:
    """Returns what follows `python -m experiments.` on the pages and in the experiments themselves:
    the name of the experiment, and its words.
    """
    files = [*(ROOT / page for page in LINKING), *(ROOT / "experiments").glob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    text = re.sub(r" *(\\\n *)?>>.*", "", text)  # where the output goes
    found = re.findall(r"python -m experiments\.([^`#\n]*)", text)
    return [shlex.split(command) for command in found]


def test_every_command_of_an_experiment_has_the_words_that_it_takes():
    for name, *words in experiment_commands():
        module = importlib.import_module(f"experiments.{name}")
        takes_words = getattr(module, "main", None) or getattr(module, name)
        inspect.signature(takes_words).bind(*words)
    shown = {name for name, *_ in experiment_commands()}
    there = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert there - shown == {"lines"}  # which the others import


@pytest.mark.parametrize("page", LINKING)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def all_tests() -> set[str]:
    """Returns the names of all tests."""
    sources = (path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    return {name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.M)}


@pytest.mark.parametrize("page", NAMING)
def test_every_test_that_a_page_names_exists(page):
    names = re.findall(r"`(test_\w+)(?:\[\w+\])?`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(names) >= 8
    assert set(names) <= all_tests()


def test_every_test_that_needs_a_gpu_is_listed_with_what_it_would_show(request):
    page = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    section = page.split("## On a GPU")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(test_\w+)(?:\[\w+\])?` \| \w", section, re.M))
    assert len(listed) == 8
    collected = {
        item.originalname for item in request.session.items if item.get_closest_marker("gpu")
    }
    assert collected <= listed


def test_every_difference_is_marked_where_it_is_coded():
    listed = README.split("## Differences")[1].split("\n## ")[0].count("\n- ")
    code = [(ROOT / name).read_text() for name in ("bert.py", "data.py", "train_pretrain.py")]
    assert sum(text.count("Differs: ") for text in code) == listed == 10


def test_the_table_of_make_run_is_that_of_the_raw_lines():
    """results/sample has the raw lines of a run of `make run`."""
    for line in story.table(ROOT / "results/sample").splitlines():
        assert f"    {line}\n" in README


def test_the_results_are_those_of_the_raw_lines():
    for row in figures.summary():
        assert row in README
    page = (ROOT / "results/README.md").read_text(encoding="utf-8")
    for files in figures.SIX_LAYERS.values():
        accuracies = [a for file in files for a in story.best_accuracies(figures.RESULTS / file)]
        shown = story.mean_and_deviation(accuracies)
        assert f"| {shown} |" in page or all(f"{accuracy:.1f}" in page for accuracy in accuracies)


def test_the_results_of_the_afternoon_are_those_of_the_raw_lines():
    page = (ROOT / "results/README.md").read_text(encoding="utf-8")
    rows = figures.afternoon_rows()
    assert len(rows) >= 10
    for row in rows:
        assert row in page
    for tokens, accuracy in zip(*figures.exports(), strict=True):
        assert f"| {tokens:.1f} | {accuracy:.1f} |" in page


def test_the_results_on_a_gpu_are_those_of_the_raw_lines():
    page = (ROOT / "results/README.md").read_text(encoding="utf-8")
    rows = figures.gpu_rows()
    assert len(rows) == 5
    for row in rows:
        assert row in page
    measured = json.loads((figures.RESULTS / "bench_h100.json").read_text())
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    lengths = bench.row_lengths(256, 128)
    operations = bench.useful_flops(
        BertConfig.named("base"), lengths, bench.masked_tokens(256, 128)
    )
    for how, after in (("uncompiled", ""), ("`torch.compile`", ", compiled")):
        cells = []
        for name in ("ours", "transformers"):
            what = f"cuda, base, 256 x 128: {name}{after}"
            tokens = measured[f"{what}, tokens/s"]
            share = tokens * operations / sum(lengths) / bench.HOPPER
            assert share == pytest.approx(measured[f"{what}, MFU"], abs=1e-3)
            cells += [f"{tokens / 1000:.0f} thousand, {100 * share:.0f}%"]
        assert f"| {how} | {' | '.join(cells)} |" in page
    hours = [
        1e6 * sum(lengths) / measured[f"cuda, base, 256 x 128: {name}, tokens/s"] / 3600
        for name in ("ours, compiled", "ours")
    ]
    expected = f"{hours[0]:.0f} and {hours[1]:.0f} hours, not 12, by 60 steps"
    assert expected in " ".join(README.split())


def test_the_first_screen_has_the_gain_at_each_share_of_the_labels():
    for share in afternoon.SHARES:
        pretrained, scratch = (
            np.mean(figures.best_setting(start, share).accuracies) for start in afternoon.STARTS
        )
        longer = np.mean(story.best_accuracies(figures.GPU / f"long/{share}.jsonl"))
        first_screen = README.split("\n## ")[0]
        assert f"**{pretrained:.1f}% against {scratch:.1f}%**" in first_screen
        assert f"**{longer:.1f}%**" in first_screen


def test_the_expected_losses_are_those_of_the_recorded_run():
    for row in afternoon.loss_table(figures.AFTERNOON / "pretrain", EXPECTED_STEPS):
        assert row in README


@pytest.mark.parametrize("length", [128, 512])
def test_the_hours_are_those_of_the_formula(length):
    """A million steps of 256 sequences of base are computed at 400 TFLOP/s."""
    masked = round(0.15 * (length - 3))
    operations = bench.useful_flops(BertConfig.named("base"), [length], masked) / length
    hours = 1e6 * 256 * length * operations / 400e12 / 3600
    assert f"| {length} | {operations / 1e6:.0f} million | {hours:.0f} |" in README


def test_what_may_be_installed_is_not_older_than_what_was_tested():
    """constraints.txt has the versions that the tests are run with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    needed = [line.split(">=") for group in groups for line in group.split()]
    assert len(needed) >= 12
    for name, *lowest in needed:
        assert name in tested
        if name not in ("ruff", "mypy"):  # `make lint` has them from constraints.txt
            assert tested[name].split(".")[:2] == lowest[0].split(".")[:2]


def test_the_sizes_are_those_of_the_code():
    page = " ".join(README.split())
    for name, (layers, width) in SIZES.items():
        assert f"{name} ({layers} x {width})" in page


def test_the_version_is_the_same_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
