"""Hub ids, against a server on this machine that speaks the hub's protocol."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from strategies import PADDING, VOCABULARY, small_tokenizer

from bert import BertConfig, BertPretrainModel, published_name

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The listing of a repository, and its files. `folders`: of each repository by its id."""

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
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=kept)


def publish(folder: Path) -> Path:
    config = BertConfig.named("tiny", vocab_size=len(VOCABULARY), max_seq_length=16)
    BertPretrainModel(config, PADDING).save_pretrained(folder, small_tokenizer())
    return folder


def test_a_hub_id_is_downloaded_once_and_then_needs_no_network(hub, tmp_path):
    """Of weights in two formats only the safe one is fetched; a folder gives the same answer."""
    Hub.folders["someone/tiny-bert"] = folder = publish(tmp_path / "published")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "tf_model.h5").write_bytes(b"large, and of no use here")
    text, home = "a [MASK] b", str(tmp_path / "home")
    first = python("bert.py", "someone/tiny-bert", text, HF_ENDPOINT=hub, HF_HOME=home)
    assert first.returncode == 0, first.stderr
    assert first.stdout == python("bert.py", str(folder), text).stdout
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sorted(Hub.served) == sorted(files | {"vocab.txt"})
    again = python("bert.py", "someone/tiny-bert", text, HF_HUB_OFFLINE="1", HF_HOME=home)
    assert again.stdout == first.stdout
    assert len(Hub.served) == 5


def test_an_old_repository_with_a_pickle_and_a_word_list_will_do(hub, tmp_path):
    """As Google's own small models are published."""
    Hub.folders["someone/old-bert"] = folder = publish(tmp_path / "published")
    expected = python("bert.py", str(folder), "a [MASK] b").stdout
    model = BertPretrainModel.from_pretrained(folder)
    tensors = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    home = str(tmp_path / "home")
    ended = python("bert.py", "someone/old-bert", "a [MASK] b", HF_ENDPOINT=hub, HF_HOME=home)
    assert ended.stdout == expected


def test_a_tokenizer_comes_from_the_hub_without_the_weights(hub, tmp_path):
    Hub.folders["someone/tiny-bert"] = publish(tmp_path / "published")
    code = "from data import load_tokenizer as t; print(t('someone/tiny-bert').encode('abc').ids)"
    ended = python("-c", code, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"))
    assert ended.stdout.strip() == str(small_tokenizer().encode("abc").ids), ended.stderr
    assert sorted(Hub.served) == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert ended.stderr.startswith("fetching someone/tiny-bert from the hub\n")


@pytest.mark.parametrize("network", [True, False])
def test_what_the_hub_does_not_give_is_said_with_what_to_name_instead(network, hub, tmp_path):
    """No such repository, or no network: one message after the name asked for, and status 2."""
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}
    if not network:
        environment["HF_HUB_OFFLINE"] = "1"
    out = str(tmp_path / "run")
    for line in ("bert.py no/such a", f"train_sst2.py --weights no/such --out {out}"):
        ended = python(*line.split(), **environment)
        assert ended.returncode == 2, ended.stderr
        first, error = ended.stderr.splitlines()
        assert first == "fetching no/such from the hub"
        assert error.startswith(
            "error: no/such is no directory, and the hub does not give it: name"
        )
        assert "name a directory with config.json, model.safetensors" in error
