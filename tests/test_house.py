"""The structure of the project: who may import whom. Importing a module does nothing but define,
and bert.py and data.py can be copied alone.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT, python
from strategies import LETTERS, write_texts

FOUR_FILES = ("bert", "data", "train_pretrain", "train_sst2")


FOLDERS = ("experiments", "sample")


MAY_IMPORT = {
    "bert": set(),
    "data": set(),
    "train_pretrain": {"bert", "data"},
    "train_sst2": {"bert", "data", "train_pretrain"},
    "experiments": {*FOUR_FILES, "experiments"},
    "sample": {"sample"},
}


def modules() -> dict[str, ast.Module]:
    """Returns every module of the project but the tests, parsed, by dotted name."""
    files = [ROOT / f"{name}.py" for name in FOUR_FILES]
    files += [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text())
        for file in files
    }


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[str]:
    """Yields the modules of this project that a piece of code imports."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in below]
        yield from {name for name in names if name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    """Also those within functions."""
    allowed = MAY_IMPORT[module.split(".")[0]]
    assert {name.split(".")[0] for name in imports(MODULES[module])} <= allowed


def test_no_module_imports_itself_in_a_circle():
    graph = {module: set(imports(tree)) for module, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert sum(len(imported) for imported in graph.values()) > 15


def test_no_module_edits_the_search_path():
    for file in [
        *ROOT.glob("*.py"),
        *(f for d in (*FOLDERS, "tests") for f in ROOT.glob(f"{d}/*")),
    ]:
        if file.suffix == ".py" and file != Path(__file__):
            assert "sys.path." not in file.read_text(), file


# ---- Importing and copying ----------------------------------------------------------------------


@pytest.mark.slow
def test_importing_the_modules_does_nothing_but_define():
    """Importing prints nothing and starts no thread."""
    pytest.importorskip("matplotlib")
    names = ", ".join(MODULES)
    code = f"import threading, {names}; print(threading.active_count())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr


@pytest.mark.slow
def test_importing_a_script_starts_nothing():
    code = "import train_pretrain, train_sst2, bert, data"
    ended = python("-c", code)
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.slow
def test_bert_needs_nothing_but_torch_to_be_imported():
    others = ("tokenizers", "safetensors", "datasets", "data")
    code = f"import sys, bert; print(any(m in sys.modules for m in {others}))"
    assert python("-c", code).stdout == "False\n"


@pytest.mark.slow
def test_bert_alone_in_a_folder_works(tmp_path):
    shutil.copy(ROOT / "bert.py", tmp_path)
    code = """
from bert import *
print(Bert(BertConfig.named('tiny'))(torch.ones(1, 3).long()).shape)
"""
    assert python("-c", code, cwd=tmp_path).stdout == "torch.Size([1, 3, 128])\n"


@pytest.mark.slow
def test_data_alone_in_a_folder_works(tmp_path):
    shutil.copy(ROOT / "data.py", tmp_path)
    write_texts(tmp_path / "corpus.jsonl", [f"{c} aa. bb cc." for c in LETTERS])
    code = """
import data
tokenizer = data.train_tokenizer(data.get_texts("corpus.jsonl"), 70)
corpus = data.get_corpus("corpus.jsonl", "train", tokenizer)
dataset = data.PretrainDataset(corpus, tokenizer, 16)
print(sorted(next(iter(data.get_split_dataloader(dataset, 2, workers=0)))))
"""
    names = "['input_ids', 'mlm_labels', 'nsp_labels', 'token_type_ids']\n"
    assert python("-c", code, cwd=tmp_path).stdout == names
