"""The pages are true: what they link to and name exists, and their commands and Python work. The
sample is what its script writes.
"""

import re
import shlex
from itertools import pairwise

import pytest
import torch
import tyro
from helpers import ROOT
from strategies import publish

from sample import generate
from train_pretrain import PretrainOptions
from train_sst2 import SST2Options

PAGES = sorted(
    str(page.relative_to(ROOT))
    for folder in (".", "experiments", "tests", "weights/mini-reviews")
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


# ---- Commands -----------------------------------------------------------------------------------


def parse(words: list[str]) -> object:
    """Returns the options of a training script, if a command runs one, and else None."""
    for script in OPTIONS.keys() & set(words):
        return tyro.cli(OPTIONS[script], args=words[words.index(script) + 1 :])
    return None


def test_the_scripts_understand_the_commands_of_the_pages():
    """Every script is in some command, with some option that is not its default."""
    told = [parse(words) for page in OF_TODAY for words in commands(read(page))]
    for cls in OPTIONS.values():
        assert any(isinstance(options, cls) and options != cls() for options in told)


def test_every_target_of_a_command_exists():
    makefiles = read("Makefile") + read("experiments/afternoon.mk")
    targets = re.findall(r"^(\w+):", makefiles, re.MULTILINE)
    lines = [words for page in OF_TODAY for words in commands(read(page))]
    called = {then for words in lines for word, then in pairwise(words) if word == "make"}
    assert {"run", "test", "bench", "afternoon"} <= called <= {*targets}


# ---- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_name_leads_to_a_file(page):
    folders = [ROOT, (ROOT / page).parent]
    for link in re.findall(r"\]\((?!http)([^)#]+)", read(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for name in re.findall(r"[\w./-]+\.(?:py|md|mk)\b", read(page) if page in OF_TODAY else ""):
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", OF_TODAY)
def test_every_name_and_flag_in_backticks_is_in_the_code(page):
    """A flag is one of the scripts', other names occur in the code."""
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    words = set(re.findall(r"\w+", "\n".join([*sources, *python_blocks(page)])))
    fields = {name for options in OPTIONS.values() for name in options.__dataclass_fields__}
    for quoted in re.findall(r"`([^`\n]+)`", read(page)):
        if re.fullmatch(r"[A-Za-z]\w*_\w+", quoted):
            assert quoted in words, quoted
        elif re.fullmatch(r"--[a-z-]+( .*)?", quoted):
            flag = quoted.split()[0].removeprefix("--").replace("-", "_")
            assert flag in {"help", *fields}, quoted


# ---- Python ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:no fitting tensor in", "ignore:not used, from")
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


# ---- The sample ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_samples_files_are_those_that_the_generator_writes(tmp_path):
    generate.main(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("**/*.jsonl"))
    assert len(written) == 5
    for path in written:
        assert (tmp_path / path).read_bytes() == (ROOT / "sample" / path).read_bytes()
