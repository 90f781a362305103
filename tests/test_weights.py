"""Weights in the published format: their names, what is saved, what is read, and what is rejected
instead of misread. A tokenizer belongs to its weights.
"""

import dataclasses
import json
import math
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import (
    FIXED,
    PADDING,
    VOCABULARY,
    Malicious,
    build,
    publish,
    small_tokenizer,
    write_cased_vocabulary,
)
from tokenizers.normalizers import BertNormalizer

import bert
import data
import train_pretrain
import train_sst2
from bert import Bert, BertPretrainModel, SST2BertModel, look, published_name, tokenizer_hash
from train_pretrain import PretrainOptions, matching_tokenizer
from train_sst2 import SST2Options


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
    """By substrings, transpose became tracls.seq_relationshipose, because it contains nsp."""
    with pytest.raises(KeyError):
        published_name("transpose.weight")
    with pytest.raises(KeyError):
        published_name("bert.layers.0.expander.weight")


def test_the_names_that_tensorflow_gave_to_norms_are_understood(tmp_path):
    """The most used checkpoint of all says gamma and beta for weight and bias."""
    from safetensors.torch import load_file, save_file

    model = build(Bert, FIXED).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(tmp_path / "model.safetensors")
    for ours, theirs in old.items():
        tensors = {name.replace(ours, theirs): t for name, t in tensors.items()}
    assert "embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = Bert.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


# ---- What is saved ------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel, SST2BertModel])
def test_what_is_saved_is_what_is_loaded(cls, tmp_path):
    """So are d_k, d_v and d_model that differ, which the published format has no word for."""
    model = build(cls, FIXED).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_encoder_survives_from_pretraining_to_fine_tuning(tmp_path):
    """Only the classifier is new, and the warning names its tensors."""
    pretrained = build(BertPretrainModel, FIXED).float()
    pretrained.save_pretrained(tmp_path, small_tokenizer())
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias$"):
        model = SST2BertModel.from_pretrained(tmp_path)
    for name, tensor in pretrained.bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], tensor), name


def test_the_files_of_a_model_are_the_published_ones(tmp_path):
    """A folder that is made holds plain JSON, safetensors and a vocabulary, nothing pickled: all
    that another program needs, under the names that it looks for."""
    from safetensors import safe_open

    folder, tokenizer = tmp_path / "new" / "model", small_tokenizer()
    BertPretrainModel(FIXED, 3).save_pretrained(folder, tokenizer)
    names = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = {
        "max_position_embeddings": 17, "vocab_size": 31, "hidden_size": 12, "attention_d_k": 10,
        "attention_d_v": 14, "num_attention_heads": 2, "intermediate_size": 22,
        "num_hidden_layers": 3, "type_vocab_size": 2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
        "fused_attention": True, "model_type": "bert", "hidden_act": "gelu",
        "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
        "tie_word_embeddings": True, "architectures": ["BertForPreTraining"], "pad_token_id": 3,
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }  # fmt: skip
    assert (folder / "config.json").read_text() == json.dumps(config, indent=2)
    about = {
        "tokenizer_class": "BertTokenizer", "model_max_length": 17, "do_lower_case": True,
        "strip_accents": None, "tokenize_chinese_chars": True,
    }  # fmt: skip
    assert (folder / "tokenizer_config.json").read_text() == json.dumps(about, indent=2)
    assert data.load_tokenizer(folder / "tokenizer.json").get_vocab() == tokenizer.get_vocab()
    assert (folder / "vocab.txt").read_text().split() == VOCABULARY
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        published = {
            "bert.embeddings.word_embeddings.weight",
            "bert.encoder.layer.2.attention.self.query.bias",
            "bert.encoder.layer.0.attention.output.LayerNorm.weight",
            "bert.encoder.layer.1.intermediate.dense.weight",
            "bert.pooler.dense.bias", "cls.predictions.bias", "cls.seq_relationship.weight",
        }  # fmt: skip
        assert published < set(file.keys())
        assert len(file.keys()) == 5 + 3 * 16 + 2 + 5 + 2


@pytest.mark.parametrize("added", [[], ["<url>", "é"]])
def test_vocab_txt_has_every_token_on_the_line_of_its_id(added, tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(added)
    (tmp_path / "vocab.txt").write_text("of another tokenizer")
    config = dataclasses.replace(FIXED, vocab_size=tokenizer.get_vocab_size())
    Bert(config, PADDING).save_pretrained(tmp_path, tokenizer)
    lines = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert {token: i for i, token in enumerate(lines)} == tokenizer.get_vocab()
    assert lines[len(VOCABULARY) :] == added


@pytest.mark.parametrize(("name", "id"), [("more", 42), ("line\nbreak", 41), ("line\rbreak", 41)])
def test_a_vocabulary_whose_lines_could_not_be_ids_has_no_vocab_txt(name, id, tmp_path):
    """It leaves out an id, or a token has two lines; tokenizer.json has them all."""
    known = {token: i for i, token in enumerate(VOCABULARY)}
    vocabulary = {**known, name: id}
    tokenizer = data.wordpiece(vocabulary)
    (tmp_path / "vocab.txt").write_text("of another tokenizer")
    config = dataclasses.replace(FIXED, vocab_size=len(VOCABULARY) + 2)
    Bert(config, PADDING).save_pretrained(tmp_path, tokenizer)
    assert not (tmp_path / "vocab.txt").exists()
    assert data.load_tokenizer(tmp_path).get_vocab() == vocabulary


@pytest.mark.parametrize("lowercase", [True, False, None])
def test_whether_text_is_lowercased_is_saved_for_other_programs(tmp_path, lowercase):
    """None stands for a tokenizer that does not normalize its text at all."""
    tokenizer = small_tokenizer()
    tokenizer.normalizer = None if lowercase is None else BertNormalizer(lowercase=lowercase)
    Bert(FIXED, PADDING).save_pretrained(tmp_path, tokenizer)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["do_lower_case"] is bool(lowercase)


@pytest.mark.parametrize("changes", [{}, {"attention_d_k": 10}, {"attention_d_v": 14}])
def test_a_shape_that_the_format_has_no_word_for_is_announced(changes, tmp_path):
    config = dataclasses.replace(FIXED, **{"attention_d_k": 12, "attention_d_v": 12, **changes})
    with warnings.catch_warnings(record=True) as announced:
        warnings.simplefilter("always")
        Bert(config, PADDING).save_pretrained(tmp_path, small_tokenizer())
    expected = ["d_k, d_v and d_model differ: only bert.py opens this"] * len(changes)
    assert [str(warning.message) for warning in announced] == expected
    assert Bert.from_pretrained(tmp_path).config == config


def test_a_loaded_model_is_in_evaluation_mode(tmp_path):
    """The same input has the same output twice, as in transformers."""
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    assert not Bert.from_pretrained(tmp_path).training


# ---- Which files --------------------------------------------------------------------------------


def split_into_shards(tensors: dict, folder, stem: str, save) -> list:
    """Writes three files and their index, as large models are published; returns the files."""
    first, last = stem.split(".")
    names = [f"{first}-{i:05}-of-00003.{last}" for i in (1, 2, 3)]
    of_tensor = {tensor: names[i % 3] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save({t: tensors[t] for t in tensors if of_tensor[t] == name}, folder / name)
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": of_tensor}))
    return [folder / name for name in names]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_every_way_to_publish_weights_loads_the_same(stem, shards, tmp_path):
    """Weights are in one file or in shards, as safetensors or in torch's own format. No shard may
    be missing."""
    from safetensors.torch import load_file, save_file

    model = build(BertPretrainModel, FIXED).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save = save_file if stem.endswith("safetensors") else torch.save
    if shards:
        files = split_into_shards(tensors, tmp_path, stem, save)
    else:
        files = [tmp_path / stem]
        save(tensors, files[0])
    loaded = BertPretrainModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    files[-1].unlink()
    with pytest.raises(
        ValueError,
        match=r"it has neither model\.safetensors nor|are missing: \w+-00003-of-00003\.\w+$",
    ):
        BertPretrainModel.from_pretrained(tmp_path)


def test_other_files_beside_the_weights_are_not_read(published):
    """An adapter or an older export in the same folder was merged into the model."""
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
    with pytest.raises(ValueError, match=r"index\.json names are missing: two\.safetensors$"):
        BertPretrainModel.from_pretrained(published)
    (published / "one.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names are missing: one\.safetensors, two\.safetensors$"):
        BertPretrainModel.from_pretrained(published)


def test_a_directory_without_a_model_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"no BERT can be read from .*config\.json"):
        Bert.from_pretrained(tmp_path)
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no BERT can be read from .*model\.safetensors"):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_damaged_files_are_rejected_in_one_line(name, damage, tmp_path):
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    content = (tmp_path / name).read_bytes()
    half = content[: len(content) // 2]
    damaged = {"cut": half, "zeros": bytes(len(content)), "empty": b""}[damage]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match="no BERT can be read from ") as rejected:
        Bert.from_pretrained(tmp_path)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[1]", "config.json holds no JSON object"),
        ("model.safetensors.index.json", "[]", "index.json holds no JSON object"),
        ("model.safetensors.index.json", "{}", "index.json names no shards"),
        ("model.safetensors.index.json", '{"weight_map": null}', "index.json names no shards"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}', "index.json names no shards"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": 5}}',
            "index.json names are missing: 5",
        ),
        ("pytorch_model.bin", [torch.ones(2)], "pytorch_model.bin holds no tensors by name"),
        ("pytorch_model.bin", torch.ones(2), "pytorch_model.bin holds no tensors by name"),
        ("pytorch_model.bin", {"bert.pooler.dense.weight": "text"}, "of the encoder is missing"),
        ("pytorch_model.bin", {1: torch.ones(2)}, "of the encoder is missing"),
        ("pytorch_model.bin", b"the model", "pytorch_model.bin: "),
    ],
)
def test_files_of_another_structure_are_rejected_in_one_line(name, content, message, tmp_path):
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    if name.endswith(".json"):
        (tmp_path / name).write_text(content)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"no BERT can be read from .*{message}") as rejected:
        Bert.from_pretrained(tmp_path)
    assert "\n" not in str(rejected.value)


def test_an_error_without_a_text_is_named_by_its_type(tmp_path, monkeypatch):
    def load(*_, **__):
        raise EOFError

    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: EOFError$"):
        Bert.from_pretrained(tmp_path)


def test_a_malicious_pickle_is_rejected_and_never_run(tmp_path):
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Malicious(str(tmp_path / "run"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Weights only load failed") as rejected:
        Bert.from_pretrained(tmp_path)
    assert "weights_only" not in str(rejected.value)  # torch's advice is how to run it
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # it would have
    assert (tmp_path / "run").exists()


# ---- Which tensors ------------------------------------------------------------------------------


def test_an_encoder_with_a_missing_tensor_is_rejected(tmp_path):
    """All missing tensors are named; for the pooler, which not every checkpoint has, a warning is
    enough."""
    from safetensors.torch import load_file, save_file

    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"not in .*: pooler\.weight, pooler\.bias$"):
        Bert.from_pretrained(tmp_path)
    del tensors["embeddings.LayerNorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the encoder is missing: embeddings\.norm\.weight$"):
        Bert.from_pretrained(tmp_path)
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    both = r"the encoder is missing: embeddings\.norm\.weight, layers\.1\.contract\.bias$"
    with pytest.raises(ValueError, match=both):
        Bert.from_pretrained(tmp_path)


def test_weights_of_another_shape_than_the_config_are_rejected(tmp_path):
    """Each tensor that differs is named with both shapes, all in one line."""
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    with pytest.raises(ValueError, match="size mismatch for layers.0.expand.weight") as rejected:
        Bert.from_pretrained(tmp_path, d_feed_forward=23)
    assert "[22, 12]" in str(rejected.value)
    assert "[23, 12]" in str(rejected.value)
    assert "layers.2.contract.weight" in str(rejected.value)
    assert "\n" not in str(rejected.value)


def test_an_embedding_that_the_model_has_no_place_for_is_named(published):
    new = ("bert.embeddings.zone.weight", "bert.embeddings.language.weight")
    change_tensors(published, **{name: torch.zeros(2, 3) for name in new})
    with pytest.raises(
        ValueError, match=r"no place for embeddings\.language\.weight, embeddings\.zone\.weight$"
    ):
        Bert.from_pretrained(published)


def test_a_part_of_the_encoder_that_the_config_has_no_place_for_is_named(published):
    """Of three layers in a file whose config says two, the third was dropped without a warning."""
    change_config(published, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"no place for encoder\.layer\.2\.attention\.output\.Lay"):
        BertPretrainModel.from_pretrained(published)


def test_position_ids_are_no_part_of_the_model(published):
    change_tensors(published, **{"bert.embeddings.position_ids": torch.arange(17)[None]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertPretrainModel.from_pretrained(published)


DECODER = "cls.predictions.decoder"


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel])
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_decoder_that_is_no_copy_of_the_embeddings_is_rejected(tensor, cls, published):
    """transformers would use it. A model without that head does not ask."""
    tensors = load_file(published / "model.safetensors")
    weight = tensors["bert.embeddings.word_embeddings.weight"]
    own = {"weight": weight.clone(), "bias": tensors["cls.predictions.bias"].clone()}
    copies = {f"{DECODER}.{name}": copy for name, copy in own.items()}
    change_tensors(published, **copies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Bert has no use for the heads
        cls.from_pretrained(published)
        own[tensor][-1] += 1
        change_tensors(published, **copies)
        if cls is Bert:
            cls.from_pretrained(published)
        else:
            with pytest.raises(ValueError, match=rf"of its own: {DECODER}\.{tensor} differs from"):
                cls.from_pretrained(published)


def test_the_bias_and_the_matrix_of_the_decoder_may_have_their_second_names_alone(published):
    tensors = load_file(published / "model.safetensors")
    del tensors["cls.predictions.bias"], tensors["bert.embeddings.word_embeddings.weight"]
    tensors[f"{DECODER}.bias"] = torch.arange(41.0)
    tensors[f"{DECODER}.weight"] = torch.ones(41, 12)
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BertPretrainModel.from_pretrained(published)
    assert torch.equal(model.mlm_bias, torch.arange(41.0))
    assert torch.equal(model.bert.embeddings.token.weight, torch.ones(41, 12))


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


def test_a_model_knows_which_parameters_its_files_lacked(published):
    """It lists them by name, since a warning may be switched off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SST2BertModel.from_pretrained(published)
    assert model.missing_parameters == ["classifier.weight", "classifier.bias"]
    assert BertPretrainModel.from_pretrained(published).missing_parameters == []
    assert Bert(FIXED, PADDING).missing_parameters == []


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


# ---- Which configurations -----------------------------------------------------------------------


@pytest.mark.parametrize(("written", "read"), [(3, 3), (None, 0), ("absent", 0)])
def test_a_published_config_needs_no_field_of_ours(tmp_path, written, read):
    """Then d_k and d_v are the width, and padding is token 0 unless the file says otherwise."""
    config = dataclasses.replace(FIXED, attention_d_k=12, attention_d_v=12)
    Bert(config, PADDING).save_pretrained(tmp_path, small_tokenizer())
    published = json.loads((tmp_path / "config.json").read_text())
    for name in ("attention_d_k", "attention_d_v", "fused_attention", "tokenizer_hash"):
        del published[name]
    published["pad_token_id"] = written
    if written == "absent":
        del published["pad_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = Bert.from_pretrained(tmp_path)
    assert model.config == config
    assert model.padding_idx == read


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
    ],
)
def test_a_model_that_is_not_bert_is_rejected_by_what_differs(field, value, tmp_path):
    """Its weights would fit, and its outputs would be wrong."""
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    published = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=f"{field} is {value!r}, not "):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": 41}, "pad_token_id is 41, of 41 tokens"),
        ({"pad_token_id": -1}, "pad_token_id is -1, of 41 tokens"),
        ({"layer_norm_eps": -1e-12}, "layer_norm_eps must be positive and finite, got -1e-12"),
        ({"pad_token_id": "0"}, "pad_token_id is '0', of 41 tokens"),
        ({"pad_token_id": 1.0}, "pad_token_id is 1.0, of 41 tokens"),
        ({"hidden_size": "12"}, "d_model must be an integer, got '12'"),
        ({"num_attention_heads": "2"}, "head_num must be an integer, got '2'"),
        ({"num_attention_heads": None}, "head_num must be an integer, got None"),
    ],
)
def test_a_config_that_makes_no_sense_is_rejected(changes, message, published):
    change_config(published, **changes)
    with pytest.raises(ValueError, match=f"no BERT can be read from .*: {message}"):
        BertPretrainModel.from_pretrained(published)


# ---- The tokenizer belongs to the weights -------------------------------------------------------


def test_the_hash_of_a_tokenizer_changes_with_any_token_or_id():
    tokens = {token: i for i, token in enumerate(VOCABULARY)}
    swapped = {**tokens, "a": tokens["b"], "b": tokens["a"]}
    renamed = {("new" if token == "z" else token): i for token, i in tokens.items()}
    hashes = [tokenizer_hash(data.wordpiece(v)) for v in (tokens, swapped, renamed)]
    assert len(set(hashes)) == 3
    assert all(re.fullmatch("v2-[0-9a-f]{16}", found) for found in hashes)


def test_hashes_that_are_saved_with_models_stay_the_same():
    """If this fails, no model that was saved before opens. Make another version of the hash then,
    as "v2-" is one."""
    assert bert.vocabulary_hash(small_tokenizer()) == "b34c96a445252528"
    assert tokenizer_hash(small_tokenizer()) == "v2-6d75df82a054b9c8"


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
    """strip_accents that is left open means the same as lowercase; a vocab.txt has the hash of the
    tokenizer.json that is made of it."""
    vocabulary = small_tokenizer().get_vocab()
    for lowercase in (True, False):
        open_, said = (
            data.wordpiece(vocabulary, lowercase=lowercase, strip_accents=strip)
            for strip in (None, lowercase)
        )
        assert tokenizer_hash(open_) == tokenizer_hash(said)
    cased = data.load_tokenizer(write_cased_vocabulary(tmp_path / "old", do_lower_case=False))
    (tmp_path / "new").mkdir()
    cased.save(str(tmp_path / "new/tokenizer.json"))
    assert tokenizer_hash(data.load_tokenizer(tmp_path / "new")) == tokenizer_hash(cased)


def test_a_tokenizer_that_lowercases_otherwise_is_not_that_of_the_weights(published, tmp_path):
    cased = data.wordpiece(small_tokenizer().get_vocab(), lowercase=False)
    cased.save(str(tmp_path / "cased.json"))
    assert matching_tokenizer(str(published), None).encode("a").ids
    with pytest.raises(ValueError, match="is not the one .* was trained with"):
        matching_tokenizer(str(published), str(tmp_path / "cased.json"))
    cased.save(str(published / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"the tokenizer {published} is not the one"):
        matching_tokenizer(str(published), None)
    small_tokenizer().save(str(published / "tokenizer.json"))
    told = PretrainOptions(weights=str(published), tokenizer=str(tmp_path / "cased.json"))
    with pytest.raises(ValueError, match=r"cased\.json is not the one .* was trained with"):
        train_pretrain.choose_tokenizer(told)


def test_the_hash_of_older_models_is_accepted_for_their_vocabulary(published, tmp_path):
    """Such a hash covers the vocabulary alone."""
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


# ---- What is fetched, and what is said ----------------------------------------------------------


def test_pickled_weights_are_fetched_from_the_hub_only_without_safetensors(
    tmp_path, monkeypatch, capsys
):
    import huggingface_hub

    asked = []

    def download(source: str, allow_patterns: list[str]) -> str:
        asked.append((source, allow_patterns[:-1], allow_patterns[-1]))
        if allow_patterns[-1].startswith("pytorch_model"):
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    others = ["config.json", "tokenizer*.json", "vocab.txt"]
    first = ("someone/some-bert", others, "model*.safetensors*")
    second = ("someone/some-bert", others, "pytorch_model*.bin*")
    assert bert.fetch("someone/some-bert") == tmp_path
    assert asked == [first, second]
    assert capsys.readouterr().err == "fetching someone/some-bert from the hub\n"
    (tmp_path / "model.safetensors").touch()
    assert bert.fetch("someone/some-bert") == tmp_path
    assert asked[2:] == [first]


def test_what_the_hub_does_not_give_is_told_with_what_to_name_instead(monkeypatch):
    import huggingface_hub

    def download(source: str, allow_patterns: list[str]) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    needed = "name a directory with config.json, model.safetensors and tokenizer.json"
    with pytest.raises(ValueError, match="^someone/some-bert is no directory, and the hub") as told:
        bert.fetch("someone/some-bert")
    assert str(told.value).endswith(f"the hub does not give it: {needed}")
    with pytest.raises(ValueError, match="^no/such/place is no directory, and no id of") as told:
        bert.fetch("no/such/place")
    assert str(told.value).endswith(f"no id of the hub: {needed}")


@pytest.mark.skipif("MUTANT_UNDER_TEST" in os.environ, reason="a mutant has frames of its own")
def test_warnings_of_loading_and_saving_point_at_the_line_that_asked(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())  # d_k differs
        SST2BertModel.from_pretrained(publish(tmp_path / "model"))  # an unused and a missing head
    messages = [str(warning.message) for warning in caught]
    assert [message.split(",")[0] for message in messages] == ["d_k", "initialized", "not used"]
    assert {warning.filename for warning in caught} == {__file__}


def test_shards_without_an_index_are_read(published):
    tensors = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = published / f"model-{shard}-of-2.safetensors"
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
    model = BertPretrainModel.from_pretrained(published)
    assert model.missing_parameters == []


def test_a_config_without_a_width_is_named(published):
    path = published / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json has no 'hidden_size'$"):
        Bert.from_pretrained(published)
