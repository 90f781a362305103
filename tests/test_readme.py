"""What the pages name is there: their links, tests and commands; recorded tables are those of the
raw lines.
"""

import configparser
import importlib.util
import inspect
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import tyro

from experiments import afternoon, story
from experiments.curves import HERE
from train_pretrain import PretrainOptions
from train_sst2 import SST2Options

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "WALKTHROUGH.md", "experiments/README.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("tests/*.md"))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """Returns the indented lines of a page that start a program, words apart, continued lines
    joined, without redirections.
    """
    text = read(page).replace("\\\n", " ")
    lines = re.findall(r"^    ((?:python|torchrun|make|[A-Z_]+=\w+ make|\.venv)\b.*)$", text, re.M)
    return [shlex.split(line.split(" > ")[0], comments=True) for line in lines]


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_every_training_command_of_a_page_is_understood(page):
    """Each flag exists and takes its value; an ellipsis stands for other flags."""
    options = {"train_pretrain.py": PretrainOptions, "train_sst2.py": SST2Options}
    for words in commands(page):
        for script in options.keys() & set(words):
            flags = [word for word in words[words.index(script) + 1 :] if word != "..."]
            tyro.cli(options[script], args=flags)


@pytest.mark.parametrize("page", PAGES)
def test_every_other_command_of_a_page_is_there(page):
    makefiles = read("Makefile") + read("experiments/afternoon.mk")
    targets = re.findall(r"^(\w+):", makefiles, re.M)
    for words in commands(page):
        if "-m" in words:
            assert importlib.util.find_spec(words[words.index("-m") + 1])
        for word, following in pairwise(words):
            if word.endswith("make") and "=" not in following:
                assert following in targets
            if following.endswith(".py"):
                assert (ROOT / following).exists()


def test_every_command_of_an_experiment_has_the_words_that_it_takes():
    for _, _, name, *words in (c for c in commands("experiments/README.md") if "-m" in c):
        main = getattr(importlib.import_module(name), "main", None)
        if main and words and words != ["draw"]:
            inspect.signature(main).bind(*words)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", read(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    sources = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    there = {name for text in sources for name in re.findall(r"^def (test_\w+)\(", text, re.M)}
    named = set(re.findall(r"`(test_\w+)(?:\[\w+\])?`", read(page)))
    assert named <= there


def test_recorded_tables_are_those_of_the_raw_lines():
    for line in story.table(HERE / "story").splitlines():
        assert f"    {line}\n" in read("README.md")
    page = read("experiments/README.md")
    for row in afternoon.loss_table(HERE / "afternoon/pretrain"):
        assert row in page
        assert row in read("README.md")
    for row in afternoon.gain_table(afternoon.accuracies(HERE / "afternoon")):
        assert row in page


def test_what_may_be_installed_is_not_older_than_what_was_tested():
    """constraints.txt has the versions that the tests are run with."""
    lines = read("constraints.txt").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for line in " ".join(groups).split():
        name, *lowest = line.split(">=")
        assert name in tested
        if lowest:
            assert tested[name].split(".")[:2] == lowest[0].split(".")[:2]


def test_the_version_is_the_same_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert f"version: {version}\n" in read("CITATION.cff")
    assert f"## {version}" in read("CHANGELOG.md")
