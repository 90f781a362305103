"""Ids of the hub: what is one, and what is fetched for it. The hub is a server on this machine that
speaks the protocol.
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
from strategies import TINY, publish, small_tokenizer

import bert
import data
from bert import BertPretrainModel, published_name

# ---- The hub is asked for nothing that is a path ------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A working folder with runs/ but no runs/bas, and a hub that must not be asked."""

    def asked(*arguments, **named):
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.setattr(data, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()


@pytest.mark.parametrize(
    "source", ["runs/bas", "./bas", "../bas/model", "/no/such", "~/bert", "a/b/c"]
)
def test_a_mistyped_directory_is_no_hub_id(source, no_hub):
    with pytest.raises(ValueError, match="is no directory, and no id of the hub"):
        bert.fetch(source)
    with pytest.raises(ValueError, match="no tokenizer at"):
        data.load_tokenizer(source)
    with pytest.raises(ValueError, match="cannot read"):
        data.get_dataset(source)
    assert not bert.is_hub_id(source)


@pytest.mark.parametrize(
    "source", ["bert-base-uncased", "google-bert/bert-base-uncased", "a/b.c_d"]
)
def test_a_hub_id_is_announced_before_it_is_fetched(source, no_hub, capsys):
    for load in (bert.fetch, data.load_tokenizer):
        with pytest.raises((AssertionError, ValueError), match="the hub was asked"):
            load(source)
        assert capsys.readouterr().err == f"fetching {source} from the hub\n"
    assert bert.is_hub_id(source)
    assert data.is_hub_id(source)


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
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sorted(Hub.served) == sorted(files | {"vocab.txt"})
    again = python("bert.py", "someone/tiny-bert", text, HF_HUB_OFFLINE="1", HF_HOME=home)
    assert again.stdout == first.stdout
    assert len(Hub.served) == 5


@pytest.mark.slow
def test_an_old_repository_with_a_pickle_and_a_word_list_is_read(hub, tmp_path):
    """Google's own small models are published in this form."""
    Hub.folders["someone/old-bert"] = folder = publish(tmp_path / "published", TINY)
    line = ("bert.py", str(folder), "a [MASK] b")
    _, expected = helpers.run_in_process(tmp_path / "output", *line)
    model = BertPretrainModel.from_pretrained(folder)
    tensors = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    home = str(tmp_path / "home")
    ended = python("bert.py", "someone/old-bert", "a [MASK] b", HF_ENDPOINT=hub, HF_HOME=home)
    assert ended.stdout == expected


@pytest.mark.slow
def test_a_tokenizer_comes_from_the_hub_without_the_weights(hub, tmp_path):
    Hub.folders["someone/tiny-bert"] = publish(tmp_path / "published", TINY)
    code = "from data import load_tokenizer as t; print(t('someone/tiny-bert').encode('abc').ids)"
    ended = python("-c", code, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"))
    assert ended.stdout.strip() == str(small_tokenizer().encode("abc").ids), ended.stderr
    assert sorted(Hub.served) == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert ended.stderr.startswith("fetching someone/tiny-bert from the hub\n")


@pytest.mark.slow
@pytest.mark.parametrize("network", [True, False])
def test_an_id_that_the_hub_lacks_is_rejected_with_what_to_name_instead(network, hub, tmp_path):
    """If there is no such repository, or no network, one message follows the name asked for, and
    the status is 2."""
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
