"""The pages are true: what they link to and name exists, and their commands and Python work."""

import configparser
import importlib
import importlib.util
import inspect
import re
import shlex
from itertools import pairwise

import pytest
import torch
import tyro
from helpers import ROOT
from strategies import publish

from train_pretrain import PretrainOptions
from train_sst2 import SST2Options

PAGES = sorted(
    str(page.relative_to(ROOT))
    for folder in (".", "experiments", "tests")
    for page in (ROOT / folder).glob("*.md")
)
# The CHANGELOG also names what is gone.
OF_TODAY = [page for page in PAGES if page != "CHANGELOG.md"]
OPTIONS = {"train_pretrain.py": PretrainOptions, "train_sst2.py": SST2Options}
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:python|torchrun|make)\b")
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("experiments/*.py")]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Returns the indented lines of a page that start a program, each as a list of words. Continued
    lines are joined; redirections and comments are dropped.
    """
    indented = re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    lines = [line.split(" > ")[0] for line in indented if PROGRAM.match(line)]
    return [shlex.split(line, comments=True) for line in lines]


def parse(words: list[str]) -> None:
    """Parses the flags of a training script, if the command runs one."""
    for script in OPTIONS.keys() & set(words):
        tyro.cli(OPTIONS[script], args=words[words.index(script) + 1 :])


# ---- Commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", OF_TODAY)
def test_the_scripts_understand_every_training_command(page):
    for words in commands(read(page)):
        parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "python train_pretrain.py --stepz 5",
        "torchrun train_pretrain.py --steps",
        "python train_sst2.py 5",
    ],
)
def test_a_command_that_a_script_does_not_understand_is_noticed(line):
    (words,) = commands(f"    {line}\n")
    with pytest.raises(SystemExit) as error:
        parse(words)
    assert error.value.code == 2


@pytest.mark.parametrize("page", OF_TODAY)
def test_every_module_target_and_script_of_a_command_exists(page):
    makefiles = read("Makefile") + read("experiments/afternoon.mk")
    targets = re.findall(r"^(\w+):", makefiles, re.MULTILINE)
    for words in commands(read(page)):
        if "-m" in words:
            assert importlib.util.find_spec(words[words.index("-m") + 1])
        for word, following in pairwise(words):
            if word == "make" and "=" not in following:
                assert following in targets
            if following.endswith(".py"):
                assert (ROOT / following).exists(), following


@pytest.mark.parametrize("page", OF_TODAY)
def test_every_experiment_takes_the_words_that_a_command_gives_it(page):
    for words in commands(read(page)):
        if "-m" not in words:
            continue
        name, *arguments = words[words.index("-m") + 1 :]
        main = getattr(importlib.import_module(name), "main", None)
        # Without arguments, or with this one, a script draws what was recorded.
        if name.startswith("experiments.") and main and arguments not in ([], ["draw"]):
            inspect.signature(main).bind(*arguments)


# ---- Names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", read(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", OF_TODAY)
def test_every_python_file_and_page_that_is_named_exists(page):
    folders = [ROOT, (ROOT / page).parent]
    for name in re.findall(r"[\w./-]+\.(?:py|md|mk)\b", read(page)):
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", OF_TODAY)
def test_every_name_and_flag_in_backticks_is_in_the_code(page):
    """A dotted name is looked up, a flag is one of the scripts', other names occur in the code."""
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    words = set(re.findall(r"\w+", "\n".join([*sources, *python_blocks(page)])))
    fields = {name for options in OPTIONS.values() for name in options.__dataclass_fields__}
    for quoted in re.findall(r"`([^`\n]+)`", read(page)):
        if re.fullmatch(r"(bert|data|train_pretrain|train_sst2)(\.(?!py\b)\w+)+", quoted):
            module, *attributes = quoted.split(".")
            thing = importlib.import_module(module)
            for attribute in attributes:
                assert hasattr(thing, attribute), quoted
                thing = getattr(thing, attribute)
        elif re.fullmatch(r"[A-Za-z]\w*_\w+", quoted):
            assert quoted in words, quoted
        elif re.fullmatch(r"--[a-z-]+( .*)?", quoted):
            flag = quoted.split()[0].removeprefix("--").replace("-", "_")
            assert flag in {"help", *fields}, quoted


# ---- Python ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:initialized, not in", "ignore:not used, of")
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """With a small model in place of the published one."""
    publish(tmp_path / "google-bert/bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks("README.md"):
        exec(block, names)
    assert capsys.readouterr().out.startswith("[{")  # the guesses for a mask
    assert names["classifier"](names["input_ids"]).shape == (len(names["texts"]), 3)
    for text, vector in zip(names["texts"], names["vectors"], strict=True):
        without_padding = torch.tensor([names["tokenizer"].encode(text).ids])
        expected = names["encoder"](without_padding)[0].mean(dim=0)
        torch.testing.assert_close(vector, expected)


# ---- Versions --------------------------------------------------------------------------------


def test_every_lower_bound_is_at_most_the_version_that_is_tested():
    """constraints.txt has the versions that the tests are run with."""

    def numbers(version: str) -> list[int]:
        return [int(number) for number in version.split(".")]

    lines = read("constraints.txt").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for line in " ".join(groups).split():
        name, *lowest = line.split(">=")
        assert name in tested
        for bound in lowest:
            assert numbers(bound) <= numbers(tested[name])


def test_the_version_is_the_same_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert f"version: {version}\n" in read("CITATION.cff")
    assert f"## {version}" in read("CHANGELOG.md")
