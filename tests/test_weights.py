"""Published weights and tokenizers: what is read, and what is rejected instead of misread."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import FIXED, PADDING, VOCABULARY, small_tokenizer

import bert
import data
import train_pretrain
import train_sst2
from bert import (
    Bert,
    BertConfig,
    BertPretrainModel,
    SST2BertModel,
    look,
    published_name,
    tokenizer_hash,
)
from train_pretrain import PretrainOptions, matching_tokenizer
from train_sst2 import SST2Options

SIZES = {"vocab_size": len(VOCABULARY), "attention_d_k": 12, "attention_d_v": 12}
SMALL = dataclasses.replace(FIXED, **SIZES)


def publish(folder: Path) -> Path:
    """Writes a model with its tokenizer; returns its folder."""
    BertPretrainModel(SMALL, PADDING).save_pretrained(folder, small_tokenizer())
    return folder


@pytest.fixture
def published(tmp_path) -> Path:
    return publish(tmp_path / "model")


def change_config(published: Path, **changes) -> None:
    path = published / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(published: Path, **changes) -> None:
    path = published / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


# ---- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("bert.layers.3.expand.bias", "bert.encoder.layer.3.intermediate.dense.bias"),
        ("layers.10.attention.output.weight", "encoder.layer.10.attention.output.dense.weight"),
        ("layers.0.attention_norm.bias", "encoder.layer.0.attention.output.LayerNorm.bias"),
        ("mlm_bias", "cls.predictions.bias"),
        ("mlm_dense.weight", "cls.predictions.transform.dense.weight"),
        ("bert.pooler.weight", "bert.pooler.dense.weight"),
        ("nsp.weight", "cls.seq_relationship.weight"),
    ],
)
def test_names_are_mapped_by_whole_dotted_parts(ours, theirs):
    assert published_name(ours) == theirs


def test_a_name_that_contains_another_is_not_mapped():
    """By substrings, transpose became tracls.seq_relationshipose: it contains nsp."""
    with pytest.raises(KeyError):
        published_name("transpose.weight")
    with pytest.raises(KeyError):
        published_name("bert.layers.0.expander.weight")


# ---- Which files --------------------------------------------------------------------------------


def test_other_files_beside_the_weights_are_not_read(published):
    """An adapter, or an older export, was merged into the model, the last name first."""
    expected = load_file(published / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for name in ("model_old.safetensors", "model-00001-of-00001.safetensors"):
        save_file(zeros, published / name, metadata={"format": "pt"})
    torch.save(zeros, published / "pytorch_model.bin")
    found = BertPretrainModel.from_pretrained(published).state_dict()
    assert torch.equal(found["nsp.weight"], expected["cls.seq_relationship.weight"])


def test_of_shards_those_that_the_index_names_are_read(published):
    tensors = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, published / file)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, published / "model-00001-of-00001.safetensors")
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = published / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = BertPretrainModel.from_pretrained(published).state_dict()
    assert torch.equal(found["nsp.weight"], tensors["cls.seq_relationship.weight"])
    (published / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json names, two\.safetensors is missing"):
        BertPretrainModel.from_pretrained(published)


# ---- Which tensors ------------------------------------------------------------------------------


def test_a_part_of_the_encoder_that_the_config_has_no_place_for_is_named(published):
    """Three layers in the file, and a config that says two: the third was dropped in silence."""
    change_config(published, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"no place for encoder\.layer\.2\.attention\.output\.Lay"):
        BertPretrainModel.from_pretrained(published)


def test_position_ids_are_no_part_of_the_model(published):
    change_tensors(published, **{"bert.embeddings.position_ids": torch.arange(17)[None]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertPretrainModel.from_pretrained(published)


def test_heads_that_are_not_used_are_one_warning(published):
    change_tensors(
        published, **{"classifier.weight": torch.ones(2, 12), "classifier.bias": torch.ones(2)}
    )
    with pytest.warns(
        UserWarning, match="not used, of .*model: classifier.bias, classifier.weight$"
    ):
        BertPretrainModel.from_pretrained(published)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Bert.from_pretrained(published)
    (warning,) = found
    assert "cls.predictions, cls.seq_relationship" in str(warning.message)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((2, 12), math.nan), "weight has a number that is not finite"),
        (torch.full((2, 12), math.inf), "weight has a number that is not finite"),
        (torch.ones(2, 12, dtype=torch.int64), "weight is of torch.int64, not of floating-point"),
        (torch.ones(2, 12, dtype=torch.bool), "weight is of torch.bool, not of floating-point"),
    ],
)
def test_weights_that_are_no_finite_floating_point_numbers_are_rejected(tensor, message, published):
    change_tensors(published, **{"cls.seq_relationship.weight": tensor})
    with pytest.raises(ValueError, match=rf"cls\.seq_relationship\.{message}"):
        BertPretrainModel.from_pretrained(published)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_point_types_are_read(dtype, published):
    change_tensors(
        published, **{"cls.seq_relationship.weight": torch.full((2, 12), 0.5, dtype=dtype)}
    )
    found = BertPretrainModel.from_pretrained(published).nsp.weight
    assert torch.equal(found, torch.full((2, 12), 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": 41}, "pad_token_id is 41, of 41 tokens"),
        ({"pad_token_id": -1}, "pad_token_id is -1, of 41 tokens"),
        ({"layer_norm_eps": -1e-12}, "layer_norm_eps must be positive and finite, got -1e-12"),
        ({"hidden_size": "12"}, "d_model must be a number, got '12'"),
    ],
)
def test_a_config_that_makes_no_sense_is_rejected(changes, message, published):
    change_config(published, **changes)
    with pytest.raises(ValueError, match=f"no BERT can be read from .*: {message}"):
        BertPretrainModel.from_pretrained(published)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["layer_norm_eps", "initializer_range"])
def test_a_config_needs_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        BertConfig(**{name: value})


# ---- The tokenizer belongs to the weights -------------------------------------------------------


def write_vocabulary(published: Path, **tokenizer_config) -> Path:
    """Writes a cased vocabulary in the old form, vocab.txt alone or with a config."""
    published.mkdir(exist_ok=True)
    (published / "vocab.txt").write_text(
        "\n".join([*VOCABULARY, "A", "é"]) + "\n", encoding="utf-8"
    )
    if tokenizer_config:
        (published / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return published


@pytest.mark.parametrize(
    ("tokenizer_config", "ids"),
    [
        ({}, ["a", "[UNK]"]),  # é becomes e, and E is no token of this vocabulary, but e is
        ({"do_lower_case": True}, ["a", "[UNK]"]),
        ({"do_lower_case": False}, ["A", "é"]),
        ({"do_lower_case": True, "strip_accents": False}, ["a", "é"]),
        ({"do_lower_case": False, "strip_accents": True}, ["A", "e"]),
    ],
)
def test_a_vocabulary_is_cased_if_its_config_says_so(tokenizer_config, ids, tmp_path):
    """A cased checkpoint without tokenizer.json was lowercased in silence."""
    published = write_vocabulary(tmp_path, **tokenizer_config)
    expected = ["a", "e"] if ids == ["a", "[UNK]"] else ids
    for source in (published, published / "vocab.txt"):
        assert data.load_tokenizer(source).encode("A é").tokens[1:-1] == expected


def test_the_hash_covers_what_the_normalizer_does():
    vocabulary = small_tokenizer().get_vocab()
    hashes = {
        tokenizer_hash(data.wordpiece(vocabulary, **normalizer))
        for normalizer in (
            {"lowercase": True},
            {"lowercase": False},
            {"strip_accents": False},
            {"handle_chinese_chars": False},
        )
    }
    assert len(hashes) == 4


def test_equal_tokenizers_in_two_forms_have_equal_hashes(tmp_path):
    """An open strip_accents is as lowercase; a vocab.txt is as the tokenizer.json of it."""
    vocabulary = small_tokenizer().get_vocab()
    for lowercase in (True, False):
        open_, said = (
            data.wordpiece(vocabulary, lowercase=lowercase, strip_accents=strip)
            for strip in (None, lowercase)
        )
        assert tokenizer_hash(open_) == tokenizer_hash(said)
    cased = data.load_tokenizer(write_vocabulary(tmp_path / "old", do_lower_case=False))
    (tmp_path / "new").mkdir()
    cased.save(str(tmp_path / "new/tokenizer.json"))
    assert tokenizer_hash(data.load_tokenizer(tmp_path / "new")) == tokenizer_hash(cased)


def test_a_tokenizer_that_lowercases_otherwise_is_not_that_of_the_weights(published, tmp_path):
    cased = data.wordpiece(small_tokenizer().get_vocab(), lowercase=False)
    cased.save(str(tmp_path / "cased.json"))
    assert matching_tokenizer(str(published), None).encode("a").ids
    with pytest.raises(ValueError, match="is not the one .* was trained with"):
        matching_tokenizer(str(published), str(tmp_path / "cased.json"))


def test_the_hash_of_models_that_were_saved_before_is_accepted_as_far_as_it_goes(
    published, tmp_path
):
    """It covers the vocabulary alone."""
    change_config(published, tokenizer_hash=bert.vocabulary_hash(small_tokenizer()))
    assert matching_tokenizer(str(published), None).get_vocab() == small_tokenizer().get_vocab()
    data.wordpiece({**small_tokenizer().get_vocab(), "new": 41}).save(str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="is not the one .* was trained with"):
        matching_tokenizer(str(published), str(tmp_path / "other.json"))


def test_two_padding_ids_are_an_error_that_names_both(published):
    """The model would attend to the padding of every batch."""
    change_config(published, pad_token_id=7)
    message = (
        r"takes id 7 for padding \(pad_token_id in config\.json\), the tokenizer's \[PAD\] is id 0"
    )
    with pytest.raises(ValueError, match=message):
        train_pretrain.make_model(
            PretrainOptions(weights=str(published), max_seq_length=17), small_tokenizer()
        )
    with pytest.raises(ValueError, match=message):
        train_sst2.make_model(SST2Options(weights=str(published)), small_tokenizer())
    with pytest.raises(ValueError, match=message):
        look(str(published), "a [MASK]")


# ---- The hub is asked for nothing that is a path ------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A published runs/ that has no bas, and a hub that must not be asked."""

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
    with pytest.raises(ValueError, match="does not exist"):
        data.get_dataset(source)
    assert not bert.is_hub_id(source)


@pytest.mark.parametrize(
    "source", ["bert-base-uncased", "google-bert/bert-base-uncased", "a/b.c_d"]
)
def test_a_hub_id_is_said_before_it_is_asked_for(source, no_hub, capsys):
    for load in (bert.fetch, data.load_tokenizer):
        with pytest.raises((AssertionError, ValueError), match="the hub was asked"):
            load(source)
        assert capsys.readouterr().err == f"fetching {source} from the hub\n"
    assert bert.is_hub_id(source)
    assert data.is_hub_id(source)


# ---- Vocabularies with large ids ----------------------------------------------------------------


def test_the_largest_id_decides_how_wide_a_token_is_stored():
    """A vocabulary with holes has few tokens, and ids above 65,535, which overflowed."""
    names = {token: i for i, token in enumerate(VOCABULARY)}
    for largest, dtype in ((2**16 - 1, "uint16"), (2**16, "uint32"), (300_000, "uint32")):
        tokenizer = data.wordpiece({**names, "xx": largest})
        rows = data.datasets.Dataset.from_dict({"text": ["xx a\n\nb", "c\n\nxx d"]})
        corpus = data.TokenizedCorpus(data.tokenize_dataset(rows, tokenizer))
        assert {str(chunk.dtype) for chunk in corpus.chunks} == {dtype}
        assert largest in corpus.tokens(0, 3)
        # Of six tokens, one is there twice.
        shares = [2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6]
        assert corpus.unigram_entropy() == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_a_classifier_knows_what_was_not_in_its_files(published):
    """By name, not by a warning, which may be switched off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SST2BertModel.from_pretrained(published)
    assert model.missing_parameters == ["classifier.weight", "classifier.bias"]
    assert BertPretrainModel.from_pretrained(published).missing_parameters == []
