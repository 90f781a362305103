# SPDX-License-Identifier: MIT
# From "BERT in four files", copyright (c) 2026 the bert-in-four-files authors.
"""BERT in one file: the model, its heads, and the format in which weights are published.

Read it from top to bottom: configuration, embeddings, attention, encoder layer, encoder, heads.
Then come loading and saving, and a small command for models that have a tokenizer.json:

    python bert.py DIRECTORY_OR_HUB_ID "the [MASK] sat on the [MASK]"

Made to be copied. Needs torch, numpy, safetensors; huggingface_hub (hub ids), tokenizers (masks).

Sources:
    [BERT]         Devlin et al. 2018, arXiv 1810.04805
    [Transformer]  Vaswani et al. 2017, arXiv 1706.03762
    [Code]         google-research/bert, commit eedf5716
A departure from them is marked "Differs:".

Names in comments on shapes:
    batch    sequences in a batch
    seq      tokens in a sequence, padding included
    d_model  width of a hidden state
    heads    attention heads; d_head is the width of one (d_k / heads, and d_v / heads for values)
    d_k      width of queries and keys over all heads (in [Transformer]: of one); d_v: of values
    vocab    tokens in the vocabulary
    masked   masked tokens of the whole batch, those to be predicted
"""

import json
import math
import re
import sys
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Configuration -----------------------------------------------------------

SIZES = {  # name: (encoder layers, d_model). base and large: [BERT] §3; the others: [Code].
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


@dataclass(frozen=True)
class BertConfig:
    """Architecture hyperparameters, by default those of BERT-base."""

    max_seq_length: int = 512
    vocab_size: int = 30522
    d_model: int = 768
    attention_d_k: int = 768  # of queries and keys, total over the heads
    attention_d_v: int = 768  # of values, total over the heads
    head_num: int = 12
    d_feed_forward: int = 3072
    encoder_layers: int = 12
    type_vocab_size: int = 2  # segment A and segment B
    dropout: float = 0.1
    attention_dropout: float = 0.1  # of attention probabilities
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02  # standard deviation of initial weights
    num_labels: int = 2  # of the classifier

    # True: PyTorch's scaled_dot_product_attention, which is faster and needs less memory.
    # False: `attention` below, which shows every step. Their outputs differ by rounding and dropout
    # only. If a token may attend to no other, `attention` averages all values; PyTorch may give 0.
    fused_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("attention_d_k", "attention_d_v"):
            width = getattr(self, name)
            if width % self.head_num:
                raise ValueError(f"{name}={width} is not divisible by head_num={self.head_num}")

    @classmethod
    def named(cls, size: str, **changes: Any) -> Self:
        """Returns a published size with changes, as in `named("base", max_seq_length=128)`. The
        other widths and the number of heads follow d_model, unless they are given as well.
        """
        layers, published_d_model = SIZES[size]
        d_model = changes.get("d_model", published_d_model)
        sizes: dict[str, Any] = {
            "d_model": d_model,
            "attention_d_k": d_model,
            "attention_d_v": d_model,
            "head_num": max(1, d_model // 64),  # in all these sizes a head is 64 wide
            "d_feed_forward": 4 * d_model,
            "encoder_layers": layers,
        }
        return cls(**{**sizes, **changes})


# ---- The encoder -------------------------------------------------------------


class Embeddings(nn.Module):
    """Computes dropout(LayerNorm(token + position + segment)). [BERT] §3, figure 2.

    Attention alone sees neither the order of the tokens nor which segment each one is in: position
    and segment embeddings supply both. Position embeddings are learned, unlike the sinusoids of
    [Transformer] §3.5, so sequences cannot exceed max_seq_length.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_seq_length, config.d_model)
        self.segment = nn.Embedding(config.type_vocab_size, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Returns (batch, seq, d_model); both arguments are (batch, seq)."""
        length = input_ids.size(1)
        longest = self.position.num_embeddings
        if length > longest:
            raise ValueError(f"a sequence of {length} tokens exceeds max_seq_length={longest}")

        token = self.token(input_ids)  # (batch, seq, d_model)
        position = self.position.weight[:length]  # (seq, d_model), the same for every sequence
        segment = self.segment(token_type_ids)  # (batch, seq, d_model)
        return self.dropout(self.norm(token + position + segment))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Computes softmax(Q K^T / sqrt(d_head)) V. [Transformer] equation 1; its d_k is d_head here.

    This is the explicit form, to read and to test against, used only if `fused_attention=False`.

    q, k, v: (..., seq, d_head), the queries, keys and values of one head, or of several at once;
    v may have its own d_head.
    mask: bool, broadcastable to (..., seq, seq), True where a query (row) may attend to a key
    (column).
    dropout: the dropout rate of the attention probabilities; 0 outside of training.

    Returns the output, as wide as v, and the probabilities, (..., seq, seq): row i holds the
    weights with which token i averages the values of all tokens.
    """
    # A score is a sum of d_head products. If their factors are independent, with mean 0 and
    # variance 1, each product has variance 1, and the sum has variance d_head. Unscaled, the
    # softmax would saturate and its gradient vanish.
    d_head = q.size(-1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(d_head)  # (..., seq, seq)

    if mask is not None:
        # The lowest finite number: with -inf, a row without any key would be 0 / 0 = NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(dim=-1)

    # Dropout sets some probabilities to 0 and scales up the others, so each query ignores a few
    # random tokens ([Code]). The probabilities returned are those before dropout.
    output = F.dropout(probs, dropout) @ v
    return output, probs


class MultiHeadAttention(nn.Module):
    """Computes Concat(head_1, ..., head_n) W^O, head_i = attention(X W^Q_i, X W^K_i, X W^V_i).

    [Transformer] §3.2.2. `query` holds W^Q_1 ... W^Q_n in one matrix, so that one product computes
    the queries of all heads: the first d_head of its outputs are the query of head 1, and so on.
    Every projection also adds a bias ([Code]), which the formula leaves out.

    d_k and d_v may differ from d_model. Only queries and keys must match in width, because they
    meet in a dot product. W^O (`output`) projects the concatenated heads, d_v wide, back to
    d_model, so that `EncoderLayer` can add it to its input.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.d_model, config.attention_d_k)
        self.key = nn.Linear(config.d_model, config.attention_d_k)
        self.value = nn.Linear(config.d_model, config.attention_d_v)
        self.output = nn.Linear(config.attention_d_v, config.d_model)
        self.config = config
        # Turns cuDNN's kernel off in the whole process: with a mask, its backward pass may return
        # NaN in torch 2.11 (pytorch/pytorch#196678). PyTorch has other kernels.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def split_heads(self, projected: Tensor) -> Tensor:
        """Cuts the last dimension into heads: (batch, seq, d) -> (batch, heads, seq, d_head)."""
        return projected.unflatten(-1, (self.config.head_num, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns (batch, seq, d_model), as x is; mask as in `attention`."""
        q = self.split_heads(self.query(x))  # (batch, heads, seq, d_head)
        k = self.split_heads(self.key(x))
        v = self.split_heads(self.value(x))

        # Neither function below knows of model.eval(): outside of training, the rate must be 0.
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.config.fused_attention:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        else:
            heads, _ = attention(q, k, v, mask, dropout)

        concatenated = heads.transpose(1, 2).flatten(2)  # (batch, seq, d_v)
        return self.output(concatenated)


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward network, each followed by "add and norm".

        x = LayerNorm(x + dropout(attention(x)))
        x = LayerNorm(x + dropout(W_2 gelu(W_1 x)))

    [Transformer] §3.1, §3.3, §5.4; GELU and the sizes: [BERT] §3, A.2. Attention moves information
    between tokens. The feed-forward network processes each token separately; by default, it holds
    two thirds of a layer's parameters.

    LayerNorm comes after the sum ("post-LN"). At the start of training, the gradients of the last
    layers are then large, and training needs warmup (Xiong et al. 2020, arXiv 2002.04745). Later
    models compute x + f(LayerNorm(x)) ("pre-LN"), with one more LayerNorm after the last layer. The
    gradient then flows back unchanged along the residual path, and training works without warmup.

    Differs: [Code] approximates GELU with tanh (error at most 5e-4); this is the exact GELU.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.expand = nn.Linear(config.d_model, config.d_feed_forward)  # W_1
        self.contract = nn.Linear(config.d_feed_forward, config.d_model)  # W_2
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns (batch, seq, d_model), as x is; mask as in `attention`."""
        attended = self.attention(x, mask)
        x = self.attention_norm(x + self.dropout(attended))
        # Another activation or order makes another model: change FIXED_FIELDS, too.
        computed = self.contract(F.gelu(self.expand(x)))
        return self.feed_forward_norm(x + self.dropout(computed))


class PretrainedModel(nn.Module):
    """What all models share: initialization, loading and saving. Your own model must take (config,
    padding_idx) and keep a `Bert` as `self.bert`. Loading restores labels of a `self.classifier`.
    """

    # For config.json: the class of transformers with the same heads.
    architecture = "BertModel"

    def __init__(self, config: BertConfig, padding_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.padding_idx = padding_idx
        self.label_names = [f"LABEL_{i}" for i in range(config.num_labels)]  # config.json: id2label
        self.missing_parameters: list[str] = []  # those that `from_pretrained` did not find

    def init_weights(self, module: nn.Module) -> None:
        """Initializes one module: weights are normally distributed with mean 0 and, by default,
        standard deviation 0.02; biases are 0. LayerNorm keeps PyTorch's: weight 1 and bias 0.

        Why so small? The logit of a token is the dot product of its embedding and a hidden state,
        whose norm LayerNorm sets to sqrt(d_model). So logits start near 0, and the first MLM loss
        is about ln(vocab). A standard deviation of 1, nn.Embedding's default, makes it far higher.

        Differs: [Code] truncates the distribution at two standard deviations.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, padding_idx: int | None = None, **changes: Any
    ) -> Self:
        """Returns a published BERT, in float32 and in evaluation mode. See `load_pretrained`.

        source: a directory or a hub id. padding_idx: the tokenizer's [PAD]; by default the one in
        config.json. changes: fields of the config to replace, such as dropout or num_labels.
        """
        return load_pretrained(cls, source, padding_idx, changes)

    def save_pretrained(self, directory: str | Path, tokenizer: Any = None) -> None:
        """Writes config, weights and tokenizer in the published format. See `write_pretrained`."""
        write_pretrained(self, Path(directory), tokenizer)


class Bert(PretrainedModel):
    """The encoder, and the pooler over its first token. [BERT] §3."""

    def __init__(self, config: BertConfig, padding_idx: int = 0) -> None:
        super().__init__(config, padding_idx)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.apply(self.init_weights)  # heads are initialized where they are made

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the last layer's hidden states, (batch, seq, d_model). Arguments: (batch, seq).

        token_type_ids: 0 = segment A, 1 = segment B; by default all 0.
        attention_mask: True = a token, False = padding; by default `input_ids != padding_idx`.
        In transformers, it is the second argument. Differs: [Code] by default masks nothing.

        No token attends to padding, so padding after the tokens never changes their output; padding
        before them shifts their positions. The output of padding means nothing: ignore it.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.padding_idx

        # The mask says which keys may be attended to. It is the same for every head and every
        # query, hence the two dimensions of size 1. (For another mask, change FIXED_FIELDS, too.)
        mask = attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, seq)

        hidden_states = self.embeddings(input_ids, token_type_ids)  # (batch, seq, d_model)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return hidden_states

    def pool(self, hidden_states: Tensor) -> Tensor:
        """Returns tanh(dense([CLS])), (batch, d_model). [Code]"""
        cls_states = hidden_states[:, 0]  # [CLS] is the first token
        return torch.tanh(self.pooler(cls_states))


class BertPretrainModel(PretrainedModel):
    """The encoder with the two heads of pretraining. [BERT] §3.1.

    Masked language model (MLM): which token was masked here? A dense layer, GELU and LayerNorm
    transform the hidden state ([Code]); the decoder then scores every token of the vocabulary.
    Next sentence prediction (NSP): does segment B follow segment A in the corpus?

    The decoder is tied to the token embeddings: the vector that stands for a token in the input
    also scores it in the output. With the published vocabulary of 30,522 tokens, this one matrix,
    vocab x d_model, is a fifth of base's parameters and nine tenths of tiny's.
    """

    architecture = "BertForPreTraining"

    def __init__(self, config: BertConfig, padding_idx: int = 0) -> None:
        super().__init__(config, padding_idx)
        self.bert = Bert(config, padding_idx)
        self.mlm_dense = nn.Linear(config.d_model, config.d_model)
        self.mlm_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.nsp = nn.Linear(config.d_model, 2)  # 0 = segment B is next, 1 = it is random
        self.init_weights(self.mlm_dense)
        self.init_weights(self.nsp)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        masked_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns mlm_logits, and nsp_logits (batch, 2) with the columns next, random.

        The first three arguments are those of `Bert`. masked_indices: (masked,), the tokens that
        get MLM logits, counted through the whole batch: token c of sequence r is r * seq + c.

        mlm_logits are (masked, vocab) with `masked_indices`, and (batch, seq, vocab) without.
        Training passes only the masked tokens, about 15%, which saves 85% of the costliest product.
        """
        hidden_states = self.bert(input_ids, token_type_ids, attention_mask)
        nsp_logits = self.nsp(self.bert.pool(hidden_states))

        if masked_indices is not None:
            if masked_indices.dim() != 1:  # such as a bool for each token
                raise ValueError(f"masked_indices are (masked,), not {masked_indices.shape}")
            hidden_states = hidden_states.flatten(0, 1)[masked_indices]  # (masked, d_model)
        transformed = self.mlm_norm(F.gelu(self.mlm_dense(hidden_states)))
        decoder = self.bert.embeddings.token.weight  # (vocab, d_model), the tied matrix
        mlm_logits = F.linear(transformed, decoder, self.mlm_bias)
        return mlm_logits, nsp_logits


class SST2BertModel(PretrainedModel):
    """The encoder with a classifier over the pooled [CLS]. [BERT] §4.1, [Code]."""

    architecture = "BertForSequenceClassification"

    def __init__(self, config: BertConfig, padding_idx: int = 0) -> None:
        super().__init__(config, padding_idx)
        self.bert = Bert(config, padding_idx)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.init_weights(self.classifier)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns logits, (batch, num_labels). Arguments: see `Bert`."""
        hidden_states = self.bert(input_ids, token_type_ids, attention_mask)
        pooled = self.bert.pool(hidden_states)  # (batch, d_model)
        return self.classifier(self.dropout(pooled))


# ---- The published format ----------------------------------------------------
#
# A directory: config.json; model.safetensors or pytorch_model.bin; tokenizer.json or vocab.txt.

# Our name: published name. Both are without `bert.`, `.weight`, `.bias`; * is a layer's number.
PUBLISHED_NAMES = {
    "embeddings.token": "embeddings.word_embeddings",  # the decoder is the same matrix
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
    "mlm_bias": "cls.predictions.bias",  # itself a parameter, not a module that has a bias
    "nsp": "cls.seq_relationship",
}
PUBLISHED_FIELDS = {  # a field of BertConfig: its name in config.json, where they differ
    "max_seq_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_feed_forward": "intermediate_size",
    "head_num": "num_attention_heads",
    "encoder_layers": "num_hidden_layers",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
# Keys that a config.json may omit; any other value is refused when loading. If your copy computes
# something else with the same tensors, change a value, so that nobody loads its models as a BERT:
# is_decoder for a causal mask (transformers knows it), hidden_act for another activation (in the
# MLM head, too), else model_type. To start from published weights, set that value after loading.
FIXED_FIELDS = {"model_type": "bert", "hidden_act": "gelu", "is_decoder": False}
TOKEN_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"  # in many files; a copy of the token embeddings
REDUNDANT = {DECODER, "cls.predictions.decoder.bias", "bert.embeddings.position_ids"}
ROLES = ("unk", "sep", "pad", "cls", "mask")  # of special tokens
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


def published_name(name: str) -> str:
    """Returns the published name of one of our parameters: `bert.layers.3.expand.bias` becomes
    `bert.encoder.layer.3.intermediate.dense.bias`. A name that is not in the table is unchanged.
    """
    parts = r"^(bert\.)?(?:layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?$"
    prefix, layer, module, kind = re.findall(parts, name)[0]
    our_name = f"layers.*.{module}" if layer else module
    return prefix + PUBLISHED_NAMES.get(our_name, our_name).replace("*", layer) + kind


def missing_prefix(tensors: dict[str, Tensor]) -> str:
    """Returns the prefix that these names lack: `bert.` for an encoder alone, else none."""
    return "" if any(name.startswith("bert.") for name in tensors) else "bert."


# ---- Loading -----------------------------------------------------------------


def load_pretrained(cls: type, source: str | Path, padding_idx: int | None, changes: dict) -> Any:
    """Returns a model of class `cls`. Each tensor whose published name and shape match a parameter
    is copied into that parameter. In the encoder, a tensor that is missing, left over or of another
    shape is an error. In the pooler and the heads it is a warning, and parameters without a tensor
    keep their initial weights: `model.missing_parameters` lists them.
    """
    directory = fetch(source)
    try:
        published = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = read_config(published)
        tensors = read_tensors(directory)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
    except Exception as error:  # json, pickle, safetensors and torch have errors of their own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot read a BERT from {directory}: {reason}") from error
    if padding_idx is None:
        padding_idx = published.get("pad_token_id") or 0  # it may be absent, or null
    model = cls(replace(config, **changes), padding_idx)

    state = model.state_dict()
    # Each parameter's published name: ours. Only `state` and missing_keys use ours, too.
    our_names = {missing_prefix(state) + published_name(ours): ours for ours in state}
    found = {name for name, ours in our_names.items() if shapes.get(name) == state[ours].shape}
    unused = sorted(tensors.keys() - found - REDUNDANT)
    misfits = {*our_names, *unused} - found  # parameters without a tensor, tensors without a place
    of_encoder = (name for name in misfits if name.startswith("bert."))
    wrong = sorted(name for name in of_encoder if not name.startswith("bert.pooler."))
    if wrong:
        raise ValueError(f"{directory}: the encoder does not fit this model: {', '.join(wrong)}")
    # Only the MLM head uses the decoder, so other models accept any.
    is_tied = DECODER not in tensors or torch.equal(tensors[DECODER], tensors[TOKEN_EMBEDDINGS])
    if "mlm_bias" in state and not is_tied:
        raise ValueError(f"{directory}: {DECODER} is not the matrix of the token embeddings")

    loaded = model.load_state_dict({our_names[n]: tensors[n] for n in found}, strict=False)
    model.missing_parameters = loaded.missing_keys
    if "classifier.weight" in found and published.get("id2label"):
        model.label_names = [published["id2label"][str(i)] for i in range(model.config.num_labels)]
    for what, names in (("no fitting tensor in", loaded.missing_keys), ("not used, from", unused)):
        if names:
            warnings.warn(f"{what} {directory}: {', '.join(names)}", stacklevel=3)
    return model.eval()


def fetch(source: str | Path) -> Path:
    """Returns a model's directory: `source` itself, or a download if `source` is a hub id."""
    directory = Path(source)
    if directory.is_dir():
        return directory

    from huggingface_hub import snapshot_download

    files = ["config.json", *TOKENIZER_FILES, "model.safetensors"]
    try:
        directory = Path(snapshot_download(str(source), allow_patterns=files))
        if not (directory / "model.safetensors").exists():  # then try the older file
            snapshot_download(str(source), allow_patterns=[*files, "pytorch_model.bin"])
    except (OSError, ValueError) as error:  # no network, no such id, or not a valid id
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source} is not a directory, and the hub failed: {reason}") from error
    return directory


def read_config(published: dict[str, Any]) -> BertConfig:
    """Returns what config.json says. Raises ValueError if it belongs to another model."""
    for key, value in FIXED_FIELDS.items():
        if published.get(key, value) != value:
            raise ValueError(f"{key} is {published[key]!r}, not {value!r}")

    # Only a config.json that was written here has d_k and d_v. In others, both equal hidden_size.
    width = published["hidden_size"]
    values: dict[str, Any] = {"attention_d_k": width, "attention_d_v": width}
    for field in fields(BertConfig):
        key = PUBLISHED_FIELDS.get(field.name, field.name)
        if key in published:
            values[field.name] = published[key]
    if published.get("id2label"):
        values["num_labels"] = len(published["id2label"])
    return BertConfig(**values)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Returns all tensors by published name, with the prefix `bert.` for the encoder."""
    from safetensors.torch import load_file

    safe_file = directory / "model.safetensors"
    old_file = directory / "pytorch_model.bin"
    if old_file.exists() and not safe_file.exists():
        # It is a pickle. `weights_only` reads tensors from it and runs no code.
        tensors = torch.load(old_file, map_location="cpu", weights_only=True)
    else:
        tensors = load_file(safe_file)

    named = {}
    for name, tensor in tensors.items():
        # TensorFlow's names for the weight and the bias of a LayerNorm.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        named[missing_prefix(tensors) + name] = tensor
    return named


# ---- Saving ------------------------------------------------------------------


def write_pretrained(model: PretrainedModel, directory: Path, tokenizer: Any) -> None:
    """Writes a model and its tokenizer in the published format, for `from_pretrained` and, if d_k
    and d_v are d_model, for transformers. Writes nothing if config and weights do not fit.
    """
    from safetensors.torch import save

    state = model.state_dict()
    config = replace(model.config, num_labels=len(model.label_names))  # `read_config` counts names
    with torch.device("meta"):  # shapes without memory
        as_configured = type(model)(config, model.padding_idx)
    as_configured.load_state_dict(state, assign=True)  # raises if a weight does not fit
    if tokenizer is None and any((directory / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(f"{directory} has a tokenizer: pass the model's own, to replace it")

    published = {PUBLISHED_FIELDS.get(name, name): v for name, v in asdict(config).items()}
    published |= FIXED_FIELDS
    published["architectures"] = [model.architecture]
    published["pad_token_id"] = model.padding_idx
    published["id2label"] = dict(enumerate(model.label_names))
    published["label2id"] = {name: i for i, name in enumerate(model.label_names)}
    contents = {"config.json": json.dumps(published, indent=2)}
    if tokenizer is not None:
        about: dict[str, Any] = {f"{role}_token": f"[{role.upper()}]" for role in ROLES}
        about["tokenizer_class"] = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is
        about["model_max_length"] = model.config.max_seq_length
        about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        contents["tokenizer_config.json"] = json.dumps(about, indent=2)
        contents["tokenizer.json"] = tokenizer.to_str(pretty=True)
    tensors = {published_name(name): tensor.cpu().contiguous() for name, tensor in state.items()}
    weights = save(tensors, metadata={"format": "pt"})

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").write_bytes(weights)
    for name, content in contents.items():
        (directory / name).write_text(content, encoding="utf-8")
    (directory / "vocab.txt").unlink(missing_ok=True)  # of a tokenizer that was there before


# ---- Filling masks, with a tokenizer from the tokenizers library -------------


def check_tokenizer(model: PretrainedModel, tokenizer: Any) -> None:
    """Raises ValueError if an id of the tokenizer has no embedding."""
    if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:
        raise ValueError(f"the tokenizer has ids beyond vocab_size={model.config.vocab_size}")


@torch.no_grad()
def fill_masks(
    model: BertPretrainModel, tokenizer: Any, text: str, k: int = 5
) -> list[dict[str, float]]:
    """Returns, for each [MASK] in a text, the k most probable tokens and their probabilities."""
    check_tokenizer(model, tokenizer)
    vocabulary = tokenizer.get_vocab()
    ids = [tokenizer.encode(text).ids]  # with [CLS] and [SEP]
    input_ids = torch.tensor(ids, device=model.mlm_bias.device)  # (1, seq)
    every_token = torch.ones_like(input_ids)  # even a [PAD] written in the text
    masked_indices = (input_ids[0] == vocabulary["[MASK]"]).nonzero().flatten()
    was_training = model.training
    model.eval()
    mlm_logits, _ = model(input_ids, attention_mask=every_token, masked_indices=masked_indices)
    model.train(was_training)

    guesses = []
    for probs in mlm_logits.softmax(dim=-1).tolist():
        # Only ids of tokens are ranked: the weights may have more rows than there are tokens.
        best = sorted(vocabulary, key=lambda token: -probs[vocabulary[token]])[:k]
        guesses.append({token: probs[vocabulary[token]] for token in best})
    return guesses


def read_tokenizer(source: str | Path) -> Any:
    """Returns the tokenizer.json of a model's directory or hub id. (All of it is downloaded.)"""
    from tokenizers import Tokenizer

    text = (fetch(source) / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()  # published tokenizers may pad and truncate
    tokenizer.no_truncation()
    return tokenizer


def main() -> None:
    """Prints a model's guesses for each [MASK] in a text."""
    _, source, text = sys.argv
    if "[MASK]" not in text:
        raise ValueError("the text has no [MASK]")
    directory = fetch(source)
    tokenizer = read_tokenizer(directory)
    model = BertPretrainModel.from_pretrained(directory, tokenizer.token_to_id("[PAD]"))
    for guesses in fill_masks(model, tokenizer, text):
        print("[MASK]  " + "  ".join(f"{token} {prob:.3f}" for token, prob in guesses.items()))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{error}\nusage: python bert.py DIRECTORY_OR_HUB_ID TEXT")
