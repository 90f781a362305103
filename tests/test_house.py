"""The structure of the project: who may import whom, and that bert.py and data.py can be copied
alone.
"""

import ast
import shutil

import pytest
from helpers import ROOT, python
from strategies import LETTERS, write_texts

MAY_IMPORT = {
    "bert": set(),
    "data": set(),
    "train_pretrain": {"bert", "data"},
    "train_sst2": {"bert", "data", "train_pretrain"},
    "sample/generate": set(),
}


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
    assert imported & {*MAY_IMPORT, "sample", "experiments", "tests"} == MAY_IMPORT[module]


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
    names = ["input_ids", "masked_indices", "mlm_labels", "mlm_targets", "nsp_labels"]
    assert ended.stdout == f"1\n{[*names, 'token_type_ids']}\n", ended.stderr
