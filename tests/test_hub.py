"""Ids of the hub: what is fetched for one. The hub is a server on this machine that speaks the
protocol.
"""

import hashlib
import http.server
import json
import os
import subprocess
import threading
from pathlib import Path

import helpers
import pytest
import torch
from strategies import TINY, VOCABULARY, publish, small_tokenizer

from bert import BertPretrainModel, fill_masks, published_name

# ---- A hub on this machine ----------------------------------------------------------------------


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The listing of a repository, and its files. `folders`: that of each repository, by its id."""

    folders: dict[str, Path] = {}  # noqa: RUF012
    served: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, with_body: bool = True) -> None:
        path = self.path.split("?")[0].strip("/").removeprefix("api/models/")
        repository = "/".join(path.split("/")[:2])
        if repository not in self.folders:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        files = {file.name: file.read_bytes() for file in self.folders[repository].iterdir()}
        name = path.split("/")[-1]
        if name in files:
            body = files[name]
            if with_body:
                self.served.append(name)
        elif "/tree/" in path:
            listing = [{"type": "file", "path": n, "size": len(b)} for n, b in files.items()]
            body = json.dumps([{**e, "oid": COMMIT} for e in listing]).encode()
        else:
            about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            body = json.dumps(about).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", hashlib.sha1(body).hexdigest())
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub():
    """The address of a server for `Hub.folders`."""
    Hub.folders, Hub.served = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return helpers.python(*arguments, env=kept)


@pytest.mark.slow
def test_a_hub_id_is_downloaded_once_and_then_needs_no_network(hub, tmp_path):
    """Of weights in two formats only the safe one is fetched; a folder gives the same answer."""
    Hub.folders["someone/tiny-bert"] = folder = publish(tmp_path / "published", TINY)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "tf_model.h5").write_bytes(b"large, and of no use here")
    text, home = "a [MASK] b", str(tmp_path / "home")
    first = python("bert.py", "someone/tiny-bert", text, HF_ENDPOINT=hub, HF_HOME=home)
    assert first.returncode == 0, first.stderr
    assert (0, first.stdout) == helpers.run_in_process(
        tmp_path / "output", "bert.py", str(folder), text
    )
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(Hub.served) == files
    again = python("bert.py", "someone/tiny-bert", text, HF_HUB_OFFLINE="1", HF_HOME=home)
    assert again.stdout == first.stdout
    assert len(Hub.served) == len(files)


@pytest.mark.slow
def test_an_old_repository_with_a_pickle_and_a_word_list_is_read(hub, tmp_path):
    """Google's own small models are published in this form."""
    Hub.folders["someone/old-bert"] = folder = publish(tmp_path / "published", TINY)
    model = BertPretrainModel.from_pretrained(folder)
    tensors = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    code = """
from bert import BertPretrainModel, fill_masks
from data import load_tokenizer
model = BertPretrainModel.from_pretrained("someone/old-bert")
print(fill_masks(model, load_tokenizer("someone/old-bert"), "a [MASK] b", k=3))
"""
    ended = python("-c", code, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"))
    assert ended.stdout.strip() == str(fill_masks(model, small_tokenizer(), "a [MASK] b", k=3))
    assert sorted(Hub.served) == ["config.json", "pytorch_model.bin", "vocab.txt"]


@pytest.mark.slow
def test_a_tokenizer_comes_from_the_hub_without_the_weights(hub, tmp_path):
    Hub.folders["someone/tiny-bert"] = publish(tmp_path / "published", TINY)
    code = "from data import load_tokenizer as t; print(t('someone/tiny-bert').encode('abc').ids)"
    ended = python("-c", code, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"))
    assert ended.stdout.strip() == str(small_tokenizer().encode("abc").ids), ended.stderr
    assert sorted(Hub.served) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("network", [True, False])
def test_what_is_no_directory_and_no_hub_id_is_one_message(network, hub, tmp_path):
    """There is no such repository, or no network, or it can be no id at all."""
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}
    if not network:
        environment["HF_HUB_OFFLINE"] = "1"
    code = """
import bert, data
for source in ("no/such", "/no/such", "../such", "a/b/c"):
    for load in (bert.fetch, data.load_tokenizer):
        try:
            load(source)
        except ValueError as error:
            assert source in str(error)
            assert len(str(error).splitlines()) == 1
            print("rejected")
"""
    ended = python("-c", code, **environment)
    assert ended.stdout == "rejected\n" * 8, ended.stderr
