"""BERT in one file: configuration, encoder, heads, and the published weight format.

- attention is written out line by line, and a fused path is held equal to it by tests;
- the vocabulary projection, the costliest layer, is computed only at masked positions;
- one table maps the names of our tensors to those of every published BERT.

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Transformer] Vaswani et al. 2017, arXiv 1706.03762.
[Code] google-research/bert, commit eedf5716.
Dimensions: batch, seq, heads, d_head, d_model, d_k, d_v, vocab, masked (all masked positions).
"""

import hashlib
import json
import math
import pickle
import re
import sys
import warnings
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Given = Tensor | None
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}  # layers, d_model. [BERT] §3, [Code]


@dataclass(frozen=True)
class BertConfig:
    """Architecture hyperparameters. Raises ValueError if they are inconsistent."""

    max_seq_length: int = 512
    vocab_size: int = 30522
    d_model: int = 768
    attention_d_k: int = 768  # queries and keys, total over the heads
    attention_d_v: int = 768  # values, total over the heads
    head_num: int = 12
    d_feed_forward: int = 3072
    encoder_layers: int = 12
    type_vocab_size: int = 2  # segments A and B
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02  # standard deviation
    fused_attention: bool = True  # False: attention() below, which tests hold equal to it

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if type(value) is int and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if name.startswith("attention_d_") and value % max(1, self.head_num):
                raise ValueError(f"{name}={value} is not divisible by head_num={self.head_num}")
            if name.endswith("dropout") and not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
            if name in ("layer_norm_eps", "initializer_range") and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @classmethod
    def named(cls, size: str, **changes: Any) -> Self:
        """Returns a published size: `BertConfig.named("base", max_seq_length=128)`."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
        layers, width = SIZES[size]
        return cls(
            **{
                "d_model": width,
                "attention_d_k": width,
                "attention_d_v": width,
                "head_num": width // 64,
                "d_feed_forward": 4 * width,
                "encoder_layers": layers,
                **changes,
            }
        )


class Embeddings(nn.Module):
    """Computes dropout(LN(token + position + segment)). [BERT] figure 2.

    Position embeddings are learned, not sines as in [Transformer] §3.5, so sequences cannot exceed
    max_seq_length.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_seq_length, config.d_model)
        self.segment = nn.Embedding(config.type_vocab_size, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        length, longest = input_ids.size(1), self.position.num_embeddings
        if length > longest:
            raise ValueError(f"a sequence of {length} tokens exceeds max_seq_length={longest}")
        position = self.position.weight[:length]  # (seq, d_model), the same for every row
        embedded = (
            self.token(input_ids) + position + self.segment(token_type_ids)
        )  # (batch, seq, d_model)
        return self.dropout(self.norm(embedded))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Given = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Computes softmax(Q K^T / sqrt(d_k)) V. [Transformer] equation 1.

    q, k: (..., seq, d_k); v: (..., seq, d_v); mask: bool, broadcastable to (..., seq, seq), True
    where a query (row) may attend to a key (column). Returns the output, (..., seq, d_v), and the
    probabilities, (..., seq, seq).
    """
    # A sum of d_k products of variance 1 has variance d_k. Unscaled, the softmax would saturate and
    # its gradient vanish.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (..., seq, seq)
    if mask is not None:  # -inf would turn a fully padded row into NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(dim=-1)
    return F.dropout(probs, dropout) @ v, probs  # dropping whole tokens from view is [Code]'s


class MultiHeadAttention(nn.Module):
    """Computes Concat(head_1 .. head_A) W^O, head_i = attention(X W^Q_i, X W^K_i, X W^V_i).

    [Transformer] §3.2.2, with the matrices of all heads stacked into one. d_k and d_v may differ
    from d_model: W^O brings the concatenated heads, d_v wide, back to d_model.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.d_model, config.attention_d_k)
        self.key = nn.Linear(config.d_model, config.attention_d_k)
        self.value = nn.Linear(config.d_model, config.attention_d_v)
        self.output = nn.Linear(config.attention_d_v, config.d_model)
        self.config = config

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            project(x)
            .unflatten(-1, (self.config.head_num, -1))
            .transpose(1, 2)  # (batch, heads, seq, d_head)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.config.fused_attention:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        else:
            heads, _ = attention(q, k, v, mask, dropout)
        return self.output(heads.transpose(1, 2).flatten(2))  # (batch, seq, d_model)


class EncoderLayer(nn.Module):
    """Computes x = LN(x + dropout(attention(x))), then x = LN(x + dropout(W_2 gelu(W_1 x))).

    [Transformer] §3.1, §3.3, §5.4, [BERT] §3. The norm comes after the sum ("post-LN"), so the
    gradient of the first layers passes through every norm above them, and training needs warmup.
    (With pre-LN, x + f(LN(x)), a path without norms leads to the first layers; its last output
    would need a norm of its own.)
    Differs: [Code] approximates GELU by a tanh (off by at most 5e-4); this is GELU itself.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.expand = nn.Linear(config.d_model, config.d_feed_forward)
        self.contract = nn.Linear(config.d_feed_forward, config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.feed_forward_norm(x + self.dropout(self.contract(F.gelu(self.expand(x)))))


# Our name of a module -> the published one; * is a layer's number. A map of the paper's matrices.
PUBLISHED_NAMES = {
    "embeddings.token": "embeddings.word_embeddings",  # the decoder of the masked LM, too
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.segment": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.*.attention.query": "encoder.layer.*.attention.self.query",  # W^Q
    "layers.*.attention.key": "encoder.layer.*.attention.self.key",  # W^K
    "layers.*.attention.value": "encoder.layer.*.attention.self.value",  # W^V
    "layers.*.attention.output": "encoder.layer.*.attention.output.dense",  # W^O
    "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.expand": "encoder.layer.*.intermediate.dense",  # W_1
    "layers.*.contract": "encoder.layer.*.output.dense",  # W_2
    "layers.*.feed_forward_norm": "encoder.layer.*.output.LayerNorm",
    "pooler": "pooler.dense",
    "mlm_dense": "cls.predictions.transform.dense",
    "mlm_norm": "cls.predictions.transform.LayerNorm",
    "mlm_bias": "cls.predictions.bias",
    "nsp": "cls.seq_relationship",
    "classifier": "classifier",
}
PUBLISHED_FIELDS = {  # of BertConfig -> of config.json, where the names differ
    "max_seq_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_feed_forward": "intermediate_size",
    "head_num": "num_attention_heads",
    "encoder_layers": "num_hidden_layers",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
EVERY_BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
COPIES = {  # published names of what other tensors hold already
    "embeddings.position_ids",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
}


def published_name(name: str) -> str:
    """Returns the published name of a parameter of ours, by whole dotted parts.

    Example: `bert.layers.3.expand.bias` -> `bert.encoder.layer.3.intermediate.dense.bias`.
    """
    prefix = "bert." if name.startswith("bert.") else ""
    parts = name.removeprefix("bert.").split(".")
    numbers = [part for part in parts if part.isdigit()]
    pattern = ".".join("*" if part.isdigit() else part for part in parts)
    if pattern in PUBLISHED_NAMES:  # a parameter that is no module's: mlm_bias
        published = PUBLISHED_NAMES[pattern]
    else:
        module, _, kind = pattern.rpartition(".")  # kind: weight or bias
        published = f"{PUBLISHED_NAMES[module]}.{kind}"
    return prefix + published.replace("*", numbers[0] if numbers else "")


def is_hub_id(source: str) -> bool:
    """Returns whether a name can be a hub id, `name` or `owner/name`, and is no path here.

    A mistyped `runs/bas` is a path where there is a folder runs: it must not be asked for.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        return False
    return "/" not in source or not Path(Path(source).parts[0]).exists()


def fetch(source: str | Path) -> Path:
    """Returns a model's directory: `source` itself, or a copy of what the hub has under that id."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    needed = "name a directory with config.json, model.safetensors and tokenizer.json"
    if not is_hub_id(str(source)):
        raise ValueError(f"{source} is no directory, and no id of the hub: {needed}")
    from huggingface_hub import snapshot_download

    print(f"fetching {source} from the hub", file=sys.stderr)
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            files = ["config.json", "tokenizer*.json", "vocab.txt", weights]
            directory = Path(snapshot_download(str(source), allow_patterns=files))
            if any(directory.glob(weights)):
                break
    except (OSError, ValueError) as error:  # no network, or no such id
        raise ValueError(
            f"{source} is no directory, and the hub does not give it: {needed}"
        ) from error
    return directory


def find_weights(directory: Path) -> list[Path]:
    """Returns the files that hold a model's tensors: one, or the shards that an index names.

    Other files beside them are not the model's: optimizers, adapters, older exports.
    """
    for name in WEIGHTS:
        index = directory / f"{name}.index.json"
        stem, _, suffix = name.rpartition(".")
        shards = sorted(directory.glob(f"{stem}-*-of-*.{suffix}"))
        if (directory / name).exists():
            return [directory / name]
        if index.exists():
            shards = sorted(
                {directory / shard for shard in read_json(index)["weight_map"].values()}
            )
        lost = [shard.name for shard in shards if not shard.exists()]
        if lost:
            raise ValueError(f"of the shards that {index.name} names, {', '.join(lost)} is missing")
        if shards:
            return shards
    raise ValueError(f"it has neither {' nor '.join(WEIGHTS)}")


def read_json(path: Path) -> dict:
    """Returns what a JSON file holds. Raises ValueError or OSError if it cannot be read."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Returns all tensors of a model, by published name without `bert.`. A pickle may hold tensors,
    but no code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in find_weights(directory):
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
            raise ValueError(f"{file.name}: {error or type(error).__name__}") from error
    renamed = {r"^bert\.": "", r"\.gamma$": ".weight", r"\.beta$": ".bias"}  # TensorFlow's names
    for old, new in renamed.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def read_config(directory: Path, changes: dict[str, Any]) -> tuple[BertConfig, int]:
    """Returns the config of a published BERT, with `changes`, and its padding id. Raises ValueError
    if it is of another model, or inconsistent.
    """
    published = read_json(directory / "config.json")
    for key, value in EVERY_BERT.items():
        if published.get(key, value) != value:
            raise ValueError(f"{key} is {published[key]!r}, not {value!r}")
    if "hidden_size" not in published:
        raise ValueError("config.json has no 'hidden_size'")
    known = dict.fromkeys(("attention_d_k", "attention_d_v"), published["hidden_size"])
    for name in BertConfig.__annotations__:
        key = PUBLISHED_FIELDS.get(name, name)
        if key in published:
            known[name] = published[key]
    config = BertConfig(**{**known, **changes})
    padding_idx = published.get("pad_token_id") or 0
    if not 0 <= padding_idx < config.vocab_size:
        raise ValueError(f"pad_token_id is {padding_idx}, of {config.vocab_size} tokens")
    return config, padding_idx


def check_tensors(tensors: dict[str, Tensor], known: Container[str]) -> list[str]:
    """Returns the heads among a file's tensors that a model has no place for, by published name.

    Raises ValueError if a part of the encoder has no place, or if a tensor that is used is not made
    of finite floating-point numbers.
    """
    unused = [name for name in tensors if name not in known and name not in COPIES]
    lost = [name for name in unused if name.startswith(("embeddings.", "encoder."))]
    if lost:
        raise ValueError(f"the config has no place for {', '.join(sorted(lost))}")
    for name, tensor in tensors.items():
        if name in known and not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}, not of floating-point numbers")
        if name in known and not tensor.isfinite().all():
            raise ValueError(f"{name} has a number that is not finite")
    return sorted({".".join(name.split(".")[:2]) for name in unused})


def vocabulary_hash(tokenizer: Any) -> str:
    """Returns sixteen hexadecimal digits that change with any token or id of the vocabulary."""
    vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Returns a hash of all that decides which ids a text gets: the vocabulary and the normalizer.

    Two files that make the same tokenizer have the same hash: what a BertNormalizer leaves open,
    strip_accents, is as its lowercase. Models that were saved before have the hash of their
    vocabulary alone, without "v2-"; it is still accepted, as far as it goes.
    """
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    if normalizer.get("type") == "BertNormalizer" and normalizer["strip_accents"] is None:
        normalizer["strip_accents"] = normalizer["lowercase"]
    effective = json.dumps(normalizer, sort_keys=True)
    digest = hashlib.sha256((vocabulary_hash(tokenizer) + effective).encode()).hexdigest()
    return f"v2-{digest[:16]}"


def is_tokenizer_of(tokenizer: Any, expected: str) -> bool:
    """Returns whether a tokenizer has the hash that was saved with a model, of either form."""
    if expected.startswith("v2-"):
        return tokenizer_hash(tokenizer) == expected
    return vocabulary_hash(tokenizer) == expected


def check_padding(model: "PretrainedModel", tokenizer: Any) -> None:
    """Raises ValueError if model and tokenizer have different padding ids: the model would attend
    to padding.
    """
    padding_id = tokenizer.get_vocab()["[PAD]"]
    if model.padding_idx != padding_id:
        raise ValueError(
            f"the model takes id {model.padding_idx} for padding (pad_token_id in config.json), the"
            f" tokenizer's [PAD] is id {padding_id}"
        )


class PretrainedModel(nn.Module):
    """Initialization, loading and saving, which the three models below share."""

    architecture: str  # the class that opens our files in transformers

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
        super().__init__()
        self.config, self.padding_idx = config, padding_idx
        self.initialized: list[str] = []  # parameters that `from_pretrained` did not find

    def init_weights(self, module: nn.Module) -> None:
        """Draws weights from N(0, 0.02) and sets biases to 0; a LayerNorm starts as (1, 0).

        So the first logits are nearly 0, and the first MLM loss is about ln V. Embeddings of
        N(0, 1), tied to the decoder, would start it far above.
        Differs: [Code] cuts the distribution off at two standard deviations.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, source: str | Path, **changes: Any) -> Self:
        """Returns a published BERT, by directory or hub id; `changes` replace fields of its config.

        Raises ValueError if it is damaged, incomplete or another model. Heads that the files lack
        have initial weights: `initialized` names their parameters, and a warning does. Heads that
        this class has no use for are named in one warning.
        """
        directory = fetch(source)
        try:
            model = cls(*read_config(directory, changes))
            names = {
                published_name(name).removeprefix("bert."): name for name in model.state_dict()
            }
            tensors = read_tensors(directory)
            unused = check_tensors(tensors, names)
            found = {names[name]: tensor for name, tensor in tensors.items() if name in names}
            model.initialized = model.load_state_dict(found, strict=False).missing_keys
            lost = [name for name in model.initialized if re.search(r"embeddings\.|layers\.", name)]
            if lost:
                raise ValueError(f"a part of the encoder is missing: {', '.join(lost)}")
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: shapes that differ
            reason = " ".join(str(error).split(". ")[0].split())
            raise ValueError(f"no BERT can be read from {directory}: {reason}") from error
        if model.initialized:
            names_of_new = ", ".join(model.initialized)
            warnings.warn(f"initialized, not in {directory}: {names_of_new}", stacklevel=2)
        if unused:
            warnings.warn(f"not used, of {directory}: {', '.join(unused)}", stacklevel=2)
        return model.eval()

    def save_pretrained(self, directory: str | Path, tokenizer: Any) -> None:
        """Writes config, weights and tokenizer in the published format, for us and others."""
        from safetensors.torch import save_file

        (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
        if {self.config.attention_d_k, self.config.attention_d_v} != {self.config.d_model}:
            warnings.warn("d_k, d_v and d_model differ: only bert.py opens this", stacklevel=2)
        tensors = {published_name(k): v.cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(directory / "tokenizer.json"))
        tokenizer.model.save(str(directory))  # vocab.txt
        config = {PUBLISHED_FIELDS.get(k, k): v for k, v in asdict(self.config).items()}
        config |= EVERY_BERT | {"architectures": [self.architecture]}
        config |= {"pad_token_id": self.padding_idx, "tokenizer_hash": tokenizer_hash(tokenizer)}
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        about = {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": self.config.max_seq_length,
            "do_lower_case": getattr(tokenizer.normalizer, "lowercase", False),
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2))


class Bert(PretrainedModel):
    """The encoder and its pooler. [BERT] §3."""

    architecture = "BertModel"

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
        super().__init__(config, padding_idx)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.apply(self.init_weights)

    def forward(
        self, input_ids: Tensor, token_type_ids: Given = None, attention_mask: Given = None
    ) -> Tensor:
        """Returns the last hidden states, (batch, seq, d_model).

        All arguments are (batch, seq). token_type_ids: 0 = segment A, 1 = segment B; by default all
        0. attention_mask: True = a real token; by default `input_ids != padding_idx`. No query
        attends to padding, so outputs at real tokens do not depend on it.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.padding_idx
        mask = attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, seq): of keys, for any query
        hidden_states = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return hidden_states

    def pool(self, hidden_states: Tensor) -> Tensor:
        """Returns tanh(dense([CLS])), one vector for the whole sequence: (batch, seq, d_model) ->
        (batch, d_model). [Code]
        """
        return torch.tanh(self.pooler(hidden_states[:, 0]))


class BertPretrainModel(PretrainedModel):
    """The encoder with both heads of pretraining. [BERT] §3.1; the MLM transform is [Code]'s.

    The MLM decoder is tied to the token embeddings: the vector that represents a token in the input
    also scores it in the output. So the largest matrix, vocab x d_model, a fifth of base, is there
    once.
    """

    architecture = "BertForPreTraining"

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
        super().__init__(config, padding_idx)
        self.bert = Bert(config, padding_idx)
        self.mlm_dense = nn.Linear(config.d_model, config.d_model)
        self.mlm_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.nsp = nn.Linear(config.d_model, 2)  # 0 = IsNext, 1 = random
        self.init_weights(self.mlm_dense)
        self.init_weights(self.nsp)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Given = None,
        attention_mask: Given = None,
        positions: Given = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns mlm_logits and nsp_logits, (batch, 2): 0 = segment B is next, 1 = it is random.

        Arguments are those of `Bert`, and positions, (masked,): flat indices into batch * seq. With
        them, mlm_logits are (masked, vocab), without them (batch, seq, vocab).
        """
        hidden_states = self.bert(input_ids, token_type_ids, attention_mask)
        nsp_logits = self.nsp(self.bert.pool(hidden_states))
        if positions is not None:  # 15% of all tokens; logits of the others would be thrown away
            hidden_states = hidden_states.flatten(0, 1)[positions]  # (masked, d_model)
        transformed = self.mlm_norm(F.gelu(self.mlm_dense(hidden_states)))
        decoder = self.bert.embeddings.token.weight  # (vocab, d_model), the tied matrix
        return F.linear(transformed, decoder, self.mlm_bias), nsp_logits


class SST2BertModel(PretrainedModel):
    """The encoder with a classifier over the pooled `[CLS]`. [BERT] §4.1, [Code]."""

    architecture = "BertForSequenceClassification"

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
        super().__init__(config, padding_idx)
        self.bert = Bert(config, padding_idx)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, 2)  # 0 = negative, 1 = positive
        self.init_weights(self.classifier)

    def forward(self, *inputs: Tensor, **named_inputs: Tensor) -> Tensor:
        """Returns logits, (batch, 2): 0 = negative, 1 = positive. Arguments are those of `Bert`."""
        return self.classifier(self.dropout(self.bert.pool(self.bert(*inputs, **named_inputs))))


if __name__ == "__main__":  # counts a model's parameters, fills masks, draws attention
    from extras.attention import main

    main()
