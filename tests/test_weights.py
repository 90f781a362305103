"""Weights in the published format: their names, what is saved, what is read, and what is rejected
instead of misread. Labels, the tokenizer that lies beside the weights, ids of the hub, and the
guesses of a model for masks.
"""

import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from helpers import assert_same, run_as_main
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import FIXED, PUBLISHABLE, VOCABULARY, Malicious, build, change_config
from strategies import change_tensors, publish, small_tokenizer

import bert
import data
import train_pretrain
from bert import Bert, BertPretrainModel, PretrainedModel, SST2BertModel, fill_masks
from bert import published_name
from train_pretrain import PretrainOptions
from train_sst2 import SST2Options


@pytest.fixture
def published(tmp_path) -> Path:
    return publish(tmp_path / "model")


def remove_tensors(published: Path, *words: str) -> None:
    """Removes the tensors whose names contain one of the words."""
    path = published / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if not any(word in n for word in words)}
    save_file(kept, path, metadata={"format": "pt"})


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert_same(one.state_dict(), other.state_dict())


def quietly(load, *arguments, **changes):
    """Loads a model whose heads are missing in the files, or not used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*arguments, **changes)


# ---- Names --------------------------------------------------------------------------------------


def test_names_are_mapped_by_whole_dotted_parts_and_unknown_ones_stay():
    in_base = "encoder.layer.10.attention.output.LayerNorm.bias"
    assert published_name("layers.10.attention_norm.bias") == in_base
    for unknown in ("bert.layers.0.expander.weight", "head.layers.1.layers.11.norm.bias"):
        assert published_name(unknown) == unknown


# ---- What is saved ------------------------------------------------------------------------------


class OwnModel(PretrainedModel):
    """A model with a head of its own, and a name that TensorFlow gave to a part of LayerNorm."""

    def __init__(self, config, padding_idx=0):
        super().__init__(config, padding_idx)
        self.bert = Bert(config, padding_idx)
        self.head = torch.nn.ParameterDict({"gamma": torch.ones(3)})


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel, SST2BertModel, OwnModel])
def test_what_is_saved_is_what_is_loaded(cls, tmp_path):
    """So are d_k, d_v and d_model that differ, for which the published format has no word."""
    config = dataclasses.replace(FIXED, num_labels=5)
    model = build(cls, config).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.missing_parameters == []
    assert loaded.label_names == [f"LABEL_{i}" for i in range(5)]
    assert not loaded.training
    assert_same_weights(loaded, model)


@pytest.mark.filterwarnings("error")
def test_the_files_of_a_model_are_the_published_ones(tmp_path):
    """Plain JSON and safetensors, nothing pickled, under the names that other programs look for."""
    folder = tmp_path / "new" / "model"
    BertPretrainModel(FIXED, 3).save_pretrained(folder, small_tokenizer())
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForPreTraining"])
    about = json.loads((folder / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert about["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
    assert all(about[f"{token[1:-1].lower()}_token"] == token for token in data.SPECIAL_TOKENS)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 5 + 3 * 16 + 2 + 5 + 2


def test_without_a_tokenizer_a_model_is_saved_where_no_other_tokenizer_lies(tmp_path):
    """The tokenizer of another model would be taken for that of these weights."""
    model = Bert(PUBLISHABLE)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_weights(Bert.from_pretrained(tmp_path), model)
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("of another model")
        with pytest.raises(ValueError, match="tokenizer"):
            model.save_pretrained(folder)
        assert [path.name for path in folder.iterdir()] == [name]


def test_an_old_vocabulary_is_deleted_when_a_tokenizer_is_saved(tmp_path):
    (tmp_path / "vocab.txt").write_text("of another tokenizer")
    Bert(PUBLISHABLE).save_pretrained(tmp_path, small_tokenizer())
    assert data.load_tokenizer(tmp_path).get_vocab() == small_tokenizer().get_vocab()
    assert not (tmp_path / "vocab.txt").exists()


def test_a_model_that_its_config_does_not_describe_is_not_saved(tmp_path):
    """It was saved, and could not be read again."""
    model = Bert(PUBLISHABLE)
    model.embeddings.position = torch.nn.Embedding(20, 12)
    with pytest.raises(RuntimeError, match=r"embeddings\.position"):
        model.save_pretrained(tmp_path / "model")
    classifier = SST2BertModel(PUBLISHABLE)
    classifier.label_names = ["bad", "fair", "good"]
    with pytest.raises(RuntimeError, match=r"classifier\.weight"):
        classifier.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---- Which files --------------------------------------------------------------------------------


def test_a_directory_without_a_model_is_rejected_by_what_it_lacks(published):
    for name in ("model.safetensors", "config.json"):
        (published / name).unlink()
        with pytest.raises(ValueError, match=f"{published}.*{name}"):
            Bert.from_pretrained(published)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_damaged_files_are_rejected_in_one_line(name, damage, published):
    if name == "pytorch_model.bin":
        torch.save(load_file(published / "model.safetensors"), published / name)
        (published / "model.safetensors").unlink()
    content = (published / name).read_bytes()
    half = content[: len(content) // 2]
    damaged = {"cut": half, "zeros": bytes(len(content)), "empty": b""}[damage]
    (published / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=str(published)) as rejected:
        BertPretrainModel.from_pretrained(published)
    assert "\n" not in str(rejected.value)


def test_a_malicious_pickle_is_rejected_and_never_run(published, tmp_path):
    (published / "model.safetensors").unlink()
    torch.save({"a": Malicious(str(tmp_path / "run"))}, published / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Weights only load failed") as rejected:
        Bert.from_pretrained(published)
    assert "weights_only=False" not in str(rejected.value)  # torch's advice is how to run it
    assert not (tmp_path / "run").exists()
    torch.load(published / "pytorch_model.bin", weights_only=False)  # it would have
    assert (tmp_path / "run").exists()


# ---- Which tensors ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_names_that_tensorflow_gave_to_norms_are_understood(published):
    """The most used checkpoint of all says gamma and beta for weight and bias. Its position ids are
    no part of the model; newer files repeat the bias. No warning names these."""
    expected = BertPretrainModel.from_pretrained(published)
    path = published / "model.safetensors"
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(17)[None]
    save_file({**old, "cls.predictions.decoder.bias": expected.mlm_bias.data + 0}, path)
    assert_same_weights(BertPretrainModel.from_pretrained(published), expected)


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel])
def test_an_encoder_that_is_not_complete_is_rejected_by_what_it_lacks(cls, published):
    lost = ["embeddings.LayerNorm.weight", "encoder.layer.1.output.dense.bias"]
    remove_tensors(published, *lost)
    with pytest.raises(ValueError, match="encoder") as rejected:
        cls.from_pretrained(published)
    assert all(name in str(rejected.value) for name in lost)


def test_a_part_of_the_encoder_that_the_config_has_no_place_for_is_named(published):
    """Of three layers in a file whose config says two, the third was dropped without a warning."""
    change_config(published, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"encoder\.layer\.2\.attention\.output\.Lay"):
        BertPretrainModel.from_pretrained(published)


def test_a_part_of_the_encoder_that_the_code_has_no_place_for_is_named(published):
    """Somebody's copy may have a gate in every layer."""
    change_tensors(published, **{"bert.layers.0.gate.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"bert\.layers\.0\.gate\.weight"):
        BertPretrainModel.from_pretrained(published)


def test_a_decoder_that_is_no_copy_of_the_embeddings_is_rejected(published):
    """transformers would use it. A model without that head does not ask."""
    tensors = load_file(published / "model.safetensors")
    decoder = tensors["bert.embeddings.word_embeddings.weight"].clone()
    name = "cls.predictions.decoder.weight"
    change_tensors(published, **{name: decoder})
    assert BertPretrainModel.from_pretrained(published).missing_parameters == []
    decoder[-1] += 1
    change_tensors(published, **{name: decoder})
    with pytest.raises(ValueError, match=name):
        BertPretrainModel.from_pretrained(published)
    quietly(Bert.from_pretrained, published)


def test_heads_that_are_missing_or_not_used_are_warned_of_and_listed(published):
    """The list is for those who switch warnings off. The encoder is that of pretraining. The names
    of another classifier's labels are not for a new one."""
    change_config(published, id2label={"0": "good", "1": "bad"})
    with pytest.warns(UserWarning, match="no fitting tensor|not used") as found:
        model = SST2BertModel.from_pretrained(published)
    assert model.missing_parameters == ["classifier.weight", "classifier.bias"]
    assert model.label_names == ["LABEL_0", "LABEL_1"]
    assert_same_weights(model.bert, quietly(Bert.from_pretrained, published))
    missing, unused = (str(warning.message) for warning in found)
    assert all(name in missing for name in model.missing_parameters)
    for name in ("cls.predictions.bias", "cls.seq_relationship.weight"):
        assert name in unused
    remove_tensors(published, "pooler")
    with pytest.warns(UserWarning, match=r"bert\.pooler\.weight, bert\.pooler\.bias$"):
        BertPretrainModel.from_pretrained(published)


# ---- Which configurations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"), [({"pad_token_id": 3}, 3), ({"pad_token_id": None}, 0), ({}, 0)]
)
def test_a_published_config_needs_no_field_of_ours(published, written, read):
    """Then d_k and d_v are the width, and padding is token 0 unless the file says otherwise."""
    path = published / "config.json"
    config = json.loads(path.read_text())
    ours = ("attention_d_k", "attention_d_v", "fused_attention", "id2label", "label2id")
    ours += ("hidden_act", "is_decoder", "pad_token_id")  # an old config.json may have none
    kept = {name: value for name, value in config.items() if name not in ours}
    path.write_text(json.dumps({**kept, **written}))
    model = BertPretrainModel.from_pretrained(published)
    assert model.config == PUBLISHABLE
    assert model.padding_idx == read
    for given in (7, 0):  # whatever the file says
        assert BertPretrainModel.from_pretrained(published, given).padding_idx == given


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "gelu_new"),
        ("is_decoder", True),
        ("num_attention_heads", 5),
    ],
)
def test_a_config_of_another_model_is_rejected_by_its_value(field, value, published):
    """With another activation the weights would fit, and the outputs would be wrong."""
    change_config(published, **{field: value})
    with pytest.raises(ValueError, match=rf"{published}.*{value}"):
        BertPretrainModel.from_pretrained(published)


# ---- Labels -------------------------------------------------------------------------------------


def test_the_labels_of_published_weights_are_counted_and_keep_their_names(tmp_path):
    """Published files have no num_labels. In somebody's model class 0 may be the positive one."""
    config = dataclasses.replace(PUBLISHABLE, num_labels=11)
    SST2BertModel(config).save_pretrained(tmp_path / "model")
    names = {str(i): f"class {i}" for i in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)}  # sorted as text
    change_config(tmp_path / "model", id2label=names)
    loaded = SST2BertModel.from_pretrained(tmp_path / "model")
    assert loaded.config.num_labels == 11
    loaded.save_pretrained(tmp_path / "again")
    again = SST2BertModel.from_pretrained(tmp_path / "again")
    assert again.label_names == [f"class {i}" for i in range(11)]


def test_a_classifier_of_other_labels_is_not_used(tmp_path):
    config = dataclasses.replace(PUBLISHABLE, num_labels=3)
    SST2BertModel(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier") as found:
        model = SST2BertModel.from_pretrained(tmp_path, num_labels=2)
    assert model.missing_parameters == ["classifier.weight", "classifier.bias"]
    assert str(found[-1].message).endswith("classifier.bias, classifier.weight")
    assert model.label_names == ["LABEL_0", "LABEL_1"]


# ---- The tokenizer lies beside the weights ------------------------------------------------------


@pytest.mark.parametrize("of_script", [PretrainOptions, SST2Options])
def test_a_tokenizer_beside_the_weights_is_the_only_one(of_script, published):
    """With another one, every id would mean another token, and nothing but a low accuracy would
    show it."""
    with pytest.raises(ValueError, match="--tokenizer"):
        of_script(weights=str(published), tokenizer=str(published))
    options = of_script(weights=str(published))
    tokenizer = train_pretrain.choose_tokenizer(options, list)
    assert tokenizer.get_vocab() == small_tokenizer().get_vocab()
    (published / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"vocab\.txt or tokenizer\.json"):
        train_pretrain.choose_tokenizer(options, list)


def test_padding_is_the_tokenizers_whatever_the_config_says(published, monkeypatch):
    """In bert-base-german-cased, [PAD] is id 1, and config.json says nothing: id 0."""
    names = ["[unused3001]", "[PAD]", *VOCABULARY[1:-1]]
    german = {token: i for i, token in enumerate(names)}
    data.wordpiece(german).save(str(published / "tokenizer.json"))
    tokenizer = data.load_tokenizer(published)
    weights = str(published)
    make_model = train_pretrain.make_model
    options = PretrainOptions(weights=weights, max_seq_length=17)
    pretrained = make_model(BertPretrainModel, options, tokenizer, 17)
    tuned = quietly(make_model, SST2BertModel, SST2Options(weights=weights), tokenizer, 17)
    assert pretrained.padding_idx == tuned.padding_idx == 1

    used = []
    monkeypatch.setattr(bert, "fill_masks", lambda model, *_: used.append(model.padding_idx) or [])
    monkeypatch.setattr(sys, "argv", ["bert.py", weights, "a [MASK]"])
    bert.main()
    assert used == [1]


# ---- Ids of the hub -----------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """The files of "someone/bert" on a hub that is a folder; what is fetched goes to another."""
    folder = publish(tmp_path / "repository")

    def snapshot_download(source: str, allow_patterns: list[str]) -> str:
        assert source == "someone/bert"
        (tmp_path / "fetched").mkdir(exist_ok=True)
        for name in {*allow_patterns} & {file.name for file in folder.iterdir()}:
            shutil.copy(folder / name, tmp_path / "fetched")
        return str(tmp_path / "fetched")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(data, "snapshot_download", snapshot_download)
    return folder


def fetched(repository: Path) -> list[str]:
    return sorted(file.name for file in (repository.parent / "fetched").iterdir())


def test_of_weights_in_two_formats_only_the_safe_one_is_fetched_from_the_hub(repository):
    """In a directory that has both, the safe one is read: here, the other contains no model."""
    torch.save({}, repository / "pytorch_model.bin")
    (repository / "tf_model.h5").write_bytes(b"large, and of no use here")
    expected = BertPretrainModel.from_pretrained(repository)
    assert_same_weights(BertPretrainModel.from_pretrained("someone/bert"), expected)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert fetched(repository) == files


def test_an_old_repository_with_a_pickle_and_a_word_list_is_read(repository):
    """Google's own small models are published in this form."""
    expected = BertPretrainModel.from_pretrained(repository)
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):  # as on a GPU
        torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (repository / name).unlink()
    (repository / "vocab.txt").write_text("\n".join(VOCABULARY))
    assert data.load_tokenizer("someone/bert").get_vocab() == small_tokenizer().get_vocab()
    assert fetched(repository) == ["vocab.txt"]  # a tokenizer comes without the weights
    shutil.rmtree(repository.parent / "fetched")
    assert_same_weights(BertPretrainModel.from_pretrained("someone/bert"), expected)
    assert fetched(repository) == ["config.json", "pytorch_model.bin", "vocab.txt"]


@pytest.mark.parametrize("source", ["no/such", "/no/such", "../such", "a/b/c"])
@pytest.mark.parametrize("load", [bert.fetch, data.load_tokenizer])
def test_what_is_neither_a_directory_nor_a_hub_id_gives_a_one_line_error(load, source):
    """There is no network, or it can be no id at all."""
    with pytest.raises(ValueError, match=source) as rejected:
        load(source)
    assert "\n" not in str(rejected.value)


# ---- Filling masks ------------------------------------------------------------------------------


def test_masks_are_filled_with_the_most_likely_tokens(device):
    """On the device of the model."""
    model = build(BertPretrainModel, PUBLISHABLE).to(device)
    best = fill_masks(model, small_tokenizer(), "a [MASK] c [MASK]", k=3)
    assert [len(row) for row in best] == [3, 3]
    ids = [[2, 5, 4, 7, 4, 3]]  # [CLS] a [MASK] c [MASK] [SEP]
    input_ids = torch.tensor(ids, device=device)
    probs = model(input_ids)[0].softmax(dim=-1)[0]
    for row, column in zip(best, (2, 4), strict=True):
        tokens = [small_tokenizer().token_to_id(token) for token in row]
        assert tokens == probs[column].topk(3).indices.tolist()
        assert list(row.values()) == pytest.approx(probs[column].topk(3).values.tolist())


def test_guesses_are_tokens_of_the_tokenizer():
    """Weights may have more rows than there are tokens: the extra rows stand for no token. They may
    not have fewer."""
    rows = len(VOCABULARY) + 7
    model = build(BertPretrainModel, dataclasses.replace(PUBLISHABLE, vocab_size=rows))
    torch.nn.init.constant_(model.mlm_bias[len(VOCABULARY) :], 9.0)
    (best,) = fill_masks(model, small_tokenizer(), "a [MASK]", k=100)
    assert set(best) == set(VOCABULARY)
    assert sum(best.values()) < 0.5  # the extra rows have the rest
    assert list(best.values()) == sorted(best.values(), reverse=True)
    fewer = build(BertPretrainModel, dataclasses.replace(PUBLISHABLE, vocab_size=40))
    with pytest.raises(ValueError, match="40"):
        fill_masks(fewer, small_tokenizer(), "a [MASK]")


def test_a_token_with_the_id_that_the_model_takes_for_padding_is_read():
    """config.json may name an ordinary token. No text that masks are filled in has padding."""
    model = build(BertPretrainModel, PUBLISHABLE)
    expected = fill_masks(model, small_tokenizer(), "a [MASK] c")
    model.padding_idx = model.bert.padding_idx = small_tokenizer().token_to_id("c")
    assert fill_masks(model, small_tokenizer(), "a [MASK] c") == expected


def test_the_command_prints_a_line_for_each_mask(published, capsys):
    """A published tokenizer.json may pad and truncate: MiniLM's pads to 128 tokens."""
    sharp = dataclasses.replace(PUBLISHABLE, initializer_range=1.0)  # every token counts
    model = BertPretrainModel.from_pretrained(publish(published, sharp))
    expected = fill_masks(model, small_tokenizer(), "a [MASK] b [MASK]")
    padded = small_tokenizer()
    padded.enable_padding(length=16)
    padded.enable_truncation(4)
    padded.save(str(published / "tokenizer.json"))
    run_as_main(bert.__file__, str(published), "a [MASK] b [MASK]")
    lines = capsys.readouterr().out.splitlines()
    for line, guesses in zip(lines, expected, strict=True):
        shown = [f"{token} {prob:.3f}" for token, prob in guesses.items()]
        assert line == "  ".join(["[MASK]", *shown])
    with pytest.raises(SystemExit, match="no/such/place"):
        run_as_main(bert.__file__, "no/such/place", "a [MASK]")
    with pytest.raises(SystemExit, match=r"no \[MASK\]"):
        run_as_main(bert.__file__, str(published), "a mask")
