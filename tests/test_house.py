"""The structure of the project: who may import whom, what the four files offer, and that bert.py
and data.py can be copied alone.

    PYTHONPATH=. python tests/test_house.py      # records interface.json anew
"""

import ast
import importlib
import inspect
import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, python
from strategies import LETTERS, write_texts

FOUR_FILES = ("bert", "data", "train_pretrain", "train_sst2")
MAY_IMPORT = {
    "bert": set(),
    "data": set(),
    "train_pretrain": {"bert", "data"},
    "train_sst2": {"bert", "data", "train_pretrain"},
    "sample/generate": set(),
}
INTERFACE = Path(__file__).with_name("interface.json")


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_one_way(module):
    """Also those within functions."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported & {*FOUR_FILES, "sample", "experiments", "tests"} == MAY_IMPORT[module]


# ---- The public surface -------------------------------------------------------------------------


def interface_of(name: str) -> dict[str, str]:
    """Returns the signature of every function, class and method that a module defines, and of each
    class its fields in order, if it is a dataclass or a NamedTuple.
    """
    module = importlib.import_module(name)
    found = {}
    for public, thing in vars(module).items():
        if getattr(thing, "__module__", None) != name or not callable(thing):
            continue
        if not inspect.isclass(thing):
            found[public] = parameters_of(thing)
            continue
        fields = [*getattr(thing, "__dataclass_fields__", getattr(thing, "_fields", ()))]
        found[public] = " ".join(fields) if fields else parameters_of(thing)
        for method, function in vars(thing).items():
            function = getattr(function, "__func__", function)  # of a classmethod
            if inspect.isfunction(function) and not method.startswith("_"):
                found[f"{public}.{method}"] = parameters_of(function)
    return dict(sorted(found.items()))


def parameters_of(function) -> str:
    """Returns names, kinds and defaults, without the types: another Python may write these in
    another way.
    """
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


FOUND = {name: interface_of(name) for name in FOUR_FILES}  # before a test patches anything


@pytest.mark.parametrize("name", FOUR_FILES)
def test_the_public_surface_is_the_recorded_one(name):
    """A change of an interface is seen, and said in the CHANGELOG."""
    assert FOUND[name] == json.loads(INTERFACE.read_text())[name]


# ---- Importing and copying ----------------------------------------------------------------------


@pytest.mark.slow
def test_bert_alone_in_a_folder_needs_nothing_but_torch(tmp_path):
    shutil.copy(ROOT / "bert.py", tmp_path)
    code = """
import sys, threading
from bert import *
others = {"tokenizers", "safetensors", "datasets", "transformers"} & set(sys.modules)
hidden_states = Bert(BertConfig.named('tiny'))(torch.ones(1, 3).long())
print(threading.active_count(), others, hidden_states.shape)
"""
    ended = python("-c", code, cwd=tmp_path)
    assert ended.stdout == "1 set() torch.Size([1, 3, 128])\n", ended.stderr


@pytest.mark.slow
def test_data_alone_in_a_folder_works_and_importing_starts_nothing(tmp_path):
    shutil.copy(ROOT / "data.py", tmp_path)
    write_texts(tmp_path / "corpus.jsonl", [f"{c} aa. bb cc." for c in LETTERS])
    code = """
import threading, data
print(threading.active_count())
documents = data.get_documents("corpus.jsonl")["train"]
tokenizer = data.train_tokenizer(documents, 70)
corpus = data.get_corpus(documents, tokenizer)
dataset = data.PretrainDataset(corpus, tokenizer, 16)
print(sorted(next(iter(data.get_split_dataloader(dataset, 2, workers=0)))))
"""
    ended = python("-c", code, cwd=tmp_path)
    names = "['input_ids', 'mlm_labels', 'nsp_labels', 'token_type_ids']\n"
    assert ended.stdout == "1\n" + names, ended.stderr


if __name__ == "__main__":
    INTERFACE.write_text(json.dumps(FOUND, indent=1) + "\n")
