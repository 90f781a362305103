"""The walkthrough shows what the code computes: every block runs, every output is compared."""

import contextlib
import io
from collections.abc import Iterator

import pytest
import torch
from helpers import ROOT

pytest.importorskip("sybil")
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

WALKTHROUGH = ROOT / "WALKTHROUGH.md"
TEXT = WALKTHROUGH.read_text(encoding="utf-8")
run_python = PythonEvaluator()


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    """The walkthrough sets the number of threads; the next test has the old one again."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lines_of(output: str) -> list[str]:
    """Returns the lines of an output without the white space at their ends."""
    return [line.rstrip() for line in output.strip("\n").splitlines()]


def run_block(example: Example) -> None:
    """Runs a python block, and keeps what it prints for the text block that follows."""
    printed = example.namespace.setdefault("printed", [])
    assert printed == [], "the output of the block before is not shown"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_python(example)
    printed.extend(lines_of(output.getvalue()))


def compare_output(example: Example) -> None:
    """Compares a text block with what the python blocks before it have printed."""
    printed = example.namespace["printed"]
    assert lines_of(str(example.parsed)) == printed
    printed.clear()


@pytest.mark.slow
def test_every_number_of_the_walkthrough_is_what_the_code_computes():
    """Runs the blocks of the page in order, and compares their outputs."""
    parsers = [CodeBlockParser("python", run_block), CodeBlockParser("text", compare_output)]
    document = Sybil(parsers).parse(WALKTHROUGH)
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    assert document.namespace["printed"] == [], "the last output is not shown"
    assert len(examples) == TEXT.count("```python\n") + TEXT.count("```text\n")
