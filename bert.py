"""BERT in one file: the model, its heads, and the format in which weights are published.

Read it from top to bottom: configuration, embeddings, attention, encoder layer, encoder, heads.
After them come loading and saving, and a small command:

    python bert.py DIR "the [MASK] sat on the [MASK]"   # counts parameters, fills masks

The file depends on no other file of this project (only its command borrows data.py's tokenizer),
and can be copied alone.

Sources:
    [BERT]         Devlin et al. 2018, arXiv 1810.04805
    [Transformer]  Vaswani et al. 2017, arXiv 1706.03762
    [Code]         google-research/bert, commit eedf5716
A departure from them is marked "Differs:".

Dimensions, as they stand in comments on shapes:
    batch    sequences in a batch
    seq      tokens in a sequence, padding included
    d_model  width of a hidden state
    heads    attention heads; d_head is the width of one, d_k / heads or d_v / heads
    d_k      width of queries and of keys, all heads together; d_v the same of values
    vocab    tokens in the vocabulary
    masked   masked positions of the whole batch, those of the tokens to be predicted
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
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
    """Architecture hyperparameters. Raises ValueError if they are inconsistent.

    The defaults are those of BERT-base.
    """

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

    # True: PyTorch's scaled_dot_product_attention, which is faster and needs less memory.
    # False: `attention` below, which shows every step. Tests check that both give the same outputs,
    # except for a sequence that is nothing but padding.
    fused_attention: bool = True

    def __post_init__(self) -> None:
        # `type(...) is`, because for isinstance True is an int, too.
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and type(value) is not int:
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if field.type is int and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if field.type is float and (type(value) is bool or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r}")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("attention_d_k", "attention_d_v"):
            value = getattr(self, name)
            if value % self.head_num:
                raise ValueError(f"{name}={value} is not divisible by head_num={self.head_num}")

    @classmethod
    def named(cls, size: str, **changes: Any) -> Self:
        """Returns a published size, with some fields changed.

        Example: `BertConfig.named("base", max_seq_length=128)`.
        """
        if size not in SIZES:
            raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
        layers, d_model = SIZES[size]
        sizes: dict[str, Any] = {
            "d_model": d_model,
            "attention_d_k": d_model,
            "attention_d_v": d_model,
            "head_num": d_model // 64,  # in all these sizes a head is 64 wide
            "d_feed_forward": 4 * d_model,
            "encoder_layers": layers,
        }
        return cls(**{**sizes, **changes})


# ---- The encoder -------------------------------------------------------------


class Embeddings(nn.Module):
    """Computes dropout(LayerNorm(token + position + segment)). [BERT] §3, figure 2.

    Attention alone does not see the order of tokens, nor which segment a token is in: the position
    and segment embeddings add both. Position embeddings are learned, unlike the sines of
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

    This is the explicit form, to read and to test against. A model computes it only with
    `fused_attention=False`; by default PyTorch's own function does the same.

    q, k, v: (..., seq, d_head), the queries, keys and values of one head, or of several at once.
    The values may have another width than queries and keys.
    mask: bool, broadcastable to (..., seq, seq), True where a query (row) may attend to a key
    (column).
    dropout: the probability with which a probability is dropped; 0 outside of training.

    Returns the output, as wide as v, and the probabilities, (..., seq, seq): row i holds the
    weights with which token i averages the values of all tokens.
    """
    # A score is a sum of d_head products. If their factors are independent, with mean 0 and
    # variance 1, each product has variance 1, and the sum has variance d_head. Unscaled, the
    # softmax would saturate and its gradient vanish.
    d_head = q.size(-1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(d_head)  # (..., seq, seq)

    # The lowest finite number: with -inf, a row without any key would become 0 / 0 = NaN.
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(dim=-1)

    # Dropout sets some probabilities to 0, and scales up the others, so that a query ignores a few
    # tokens. [Code]
    # The returned probabilities are those before dropout.
    output = F.dropout(probs, dropout) @ v
    return output, probs


class MultiHeadAttention(nn.Module):
    """Computes Concat(head_1, ..., head_n) W^O, head_i = attention(X W^Q_i, X W^K_i, X W^V_i).

    [Transformer] §3.2.2. `query` holds W^Q_1 ... W^Q_n in one matrix, so that one product computes
    the queries of all heads: the first d_head of its outputs are the query of head 1, and so on.
    Every product also adds a bias ([Code]), which the formula leaves out.

    d_k and d_v may differ from d_model: queries and keys only have to have the same width, because
    they meet in a dot product, and W^O (`output`) brings the concatenated heads, d_v wide, back to
    d_model, so that the layer can add its input to its output.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.d_model, config.attention_d_k)
        self.key = nn.Linear(config.d_model, config.attention_d_k)
        self.value = nn.Linear(config.d_model, config.attention_d_v)
        self.output = nn.Linear(config.attention_d_v, config.d_model)
        self.config = config

    def split_heads(self, projected: Tensor) -> Tensor:
        """Cuts the last dimension into heads: (batch, seq, d) -> (batch, heads, seq, d_head)."""
        return projected.unflatten(-1, (self.config.head_num, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns (batch, seq, d_model), as x is; mask as in `attention`."""
        q = self.split_heads(self.query(x))  # (batch, heads, seq, d_head)
        k = self.split_heads(self.key(x))
        v = self.split_heads(self.value(x))

        # Neither function below knows by itself whether the model is being trained.
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
    between tokens. The feed-forward network computes on each token by itself; it has two thirds of
    a layer's parameters.

    LayerNorm comes after the sum ("post-LN"). At the start of training, the gradients of the last
    layers are then large, and training needs warmup (Xiong et al. 2020, arXiv 2002.04745). Later
    models compute x + f(LayerNorm(x)) ("pre-LN"). There x is passed on from sum to sum without a
    LayerNorm (only the input of f is normalized). The gradient flows back along this path
    unchanged, and training works without warmup.

    Differs: [Code] approximates GELU by a tanh (at most 5e-4 off); this is GELU itself.
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
        computed = self.contract(F.gelu(self.expand(x)))
        return self.feed_forward_norm(x + self.dropout(computed))


class PretrainedModel(nn.Module):
    """What the three models below share: initial weights, loading and saving."""

    # The class in the library transformers that opens what `save_pretrained` writes.
    architecture: str

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
        super().__init__()
        self.config = config
        self.padding_idx = padding_idx
        self.missing_parameters: list[str] = []  # those that `from_pretrained` did not find

    def init_weights(self, module: nn.Module) -> None:
        """Initializes one module: weights from a normal distribution with mean 0 and standard
        deviation `initializer_range`, 0.02 by default; biases 0. A LayerNorm stays as PyTorch makes
        it, with weight 1 and bias 0.

        Why so small? The logit of a token is the dot product of a hidden state and the token's row
        of the embeddings, which are also the decoder. LayerNorm gives the hidden state the length
        sqrt(d_model), so the logits have the standard deviation 0.02 sqrt(d_model), 0.55 for base.
        All tokens are about equally probable at first, and the first MLM loss is about ln(vocab).
        With PyTorch's default for embeddings, 1 instead of 0.02, the logits would be 50 times as
        large, and the first loss far above ln(vocab).

        Differs: [Code] cuts the distribution off at two standard deviations.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, source: str | Path, **changes: Any) -> Self:
        """Returns a published BERT, in evaluation mode. See `load_pretrained`.

        source: a directory or a hub id. changes: fields of its config to replace, such as dropout;
        none that changes the shape of a tensor.
        """
        return load_pretrained(cls, source, changes)

    def save_pretrained(self, directory: str | Path, tokenizer: Any) -> None:
        """Writes config, weights and tokenizer in the published format. See `write_pretrained`."""
        write_pretrained(self, Path(directory), tokenizer)


class Bert(PretrainedModel):
    """The encoder, and the pooler over its first token. [BERT] §3."""

    architecture = "BertModel"

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
        super().__init__(config, padding_idx)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.apply(self.init_weights)  # models with heads have only their heads left to initialize

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the last layer's hidden states, (batch, seq, d_model).

        All arguments are (batch, seq).
        token_type_ids: 0 = segment A, 1 = segment B; by default all 0.
        attention_mask: True = a token, False = padding; by default `input_ids != padding_idx`.

        No token attends to padding, so padding never changes the output at the other positions. The
        output at padding positions themselves means nothing; the losses ignore it.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.padding_idx

        # The mask says which keys may be attended to. It is the same for every head and every
        # query, hence the two dimensions of size 1.
        mask = attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, seq)

        hidden_states = self.embeddings(input_ids, token_type_ids)  # (batch, seq, d_model)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return hidden_states

    def pool(self, hidden_states: Tensor) -> Tensor:
        """Returns tanh(dense([CLS])), one vector for each sequence. [Code]

        hidden_states: (batch, seq, d_model). Returns (batch, d_model).
        """
        cls_states = hidden_states[:, 0]  # [CLS] is the first token
        return torch.tanh(self.pooler(cls_states))


class BertPretrainModel(PretrainedModel):
    """The encoder with the two heads of pretraining. [BERT] §3.1.

    Masked language model (MLM): which token stood at a masked position? dense, GELU and LayerNorm
    transform the hidden state ([Code]); the decoder then scores every token of the vocabulary.
    Next sentence prediction (NSP): does segment B follow segment A in the corpus?

    The decoder is tied to the token embeddings: the vector that stands for a token in the input
    also scores it in the output. With the published vocabulary of 30,522 tokens, this matrix, vocab
    x d_model, is the largest of all: a fifth of base's parameters, nine tenths of tiny's.
    """

    architecture = "BertForPreTraining"

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
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
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns mlm_logits and nsp_logits, the latter (batch, 2): 0 = next, 1 = random.

        The first three arguments are those of `Bert`.
        positions: (masked,), where MLM logits are wanted, counted through the whole batch: token c
        of sequence r is r * seq + c.

        mlm_logits are (masked, vocab) with `positions`, and (batch, seq, vocab) without. Training
        passes the masked positions, about 15% of all, and saves 85% of the costliest product.
        """
        hidden_states = self.bert(input_ids, token_type_ids, attention_mask)
        nsp_logits = self.nsp(self.bert.pool(hidden_states))

        if positions is not None:
            hidden_states = hidden_states.flatten(0, 1)[positions]  # (masked, d_model)
        transformed = self.mlm_norm(F.gelu(self.mlm_dense(hidden_states)))
        decoder = self.bert.embeddings.token.weight  # (vocab, d_model), the tied matrix
        mlm_logits = F.linear(transformed, decoder, self.mlm_bias)
        return mlm_logits, nsp_logits


class SST2BertModel(PretrainedModel):
    """The encoder with a classifier over the pooled [CLS]. [BERT] §4.1, [Code]."""

    architecture = "BertForSequenceClassification"

    def __init__(self, config: BertConfig, padding_idx: int) -> None:
        super().__init__(config, padding_idx)
        self.bert = Bert(config, padding_idx)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, 2)  # 0 = negative, 1 = positive
        self.init_weights(self.classifier)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns logits, (batch, 2): 0 = negative, 1 = positive. Arguments: see `Bert`."""
        hidden_states = self.bert(input_ids, token_type_ids, attention_mask)
        pooled = self.bert.pool(hidden_states)  # (batch, d_model)
        return self.classifier(self.dropout(pooled))


# ---- The published format ----------------------------------------------------
#
# A published BERT is a directory with config.json, model.safetensors (or the older
# pytorch_model.bin, or shards of either), tokenizer.json or vocab.txt, and tokenizer_config.json.
# All published BERTs name their tensors alike, but for the prefix `bert.`, which some leave out,
# and for gamma and beta, TensorFlow's names in LayerNorm. PUBLISHED_NAMES is also a map of the
# paper's matrices: W^Q, W^K, W^V and W^O of attention, W_1 and W_2 of the feed-forward network.

# Our name of a module: its published name, both without `bert.` in front. `.weight` or `.bias`
# follows; only mlm_bias is a parameter itself. * is the index of a layer.
PUBLISHED_NAMES = {
    "embeddings.token": "embeddings.word_embeddings",  # also the decoder
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
PUBLISHED_FIELDS = {  # a field of BertConfig: its name in config.json, where they differ
    "max_seq_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_feed_forward": "intermediate_size",
    "head_num": "num_attention_heads",
    "encoder_layers": "num_hidden_layers",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
FIXED_FIELDS = {  # what config.json says of every BERT; other values mean another model
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
COPIES = {  # copy: original. Many published files hold these tensors twice.
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
REDUNDANT_TENSORS = {*COPIES, "embeddings.position_ids"}  # position_ids: a table of 0, 1, 2, ...
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read


def published_name(name: str) -> str:
    """Returns the published name of one of our parameters, by `PUBLISHED_NAMES`.

    Example: `bert.layers.3.expand.bias` -> `bert.encoder.layer.3.intermediate.dense.bias`.
    """
    prefix = "bert." if name.startswith("bert.") else ""
    name = name.removeprefix("bert.")
    match = re.search(r"layers\.(\d+)\.", name)
    layer = match[1] if match else ""
    pattern = re.sub(r"layers\.\d+\.", "layers.*.", name)

    if pattern in PUBLISHED_NAMES:  # mlm_bias
        published = PUBLISHED_NAMES[pattern]
    else:
        module, _, kind = pattern.rpartition(".")  # kind: weight or bias
        published = f"{PUBLISHED_NAMES[module]}.{kind}"
    return prefix + published.replace("*", layer)


# ---- Loading -----------------------------------------------------------------


def load_pretrained(cls: type[PretrainedModel], source: str | Path, changes: dict[str, Any]) -> Any:
    """Returns a model of class `cls` with published weights, in evaluation mode.

    1. Find the directory, or download it.
    2. Read config.json, and make a model of that shape with initial weights.
    3. Read the tensors, rename them, check them, and copy them into the model.

    Raises ValueError if the files are corrupt, incomplete or not a BERT. The files may lack the
    pooler and heads. These keep their initial weights; `model.missing_parameters` lists their
    parameters, and a warning names them. Another warning names heads in the files that this class
    does not have.
    """
    directory = fetch(source)
    try:
        config, padding_idx = read_config(directory, changes)
        model = cls(config, padding_idx)
        our_names = {  # by published name
            published_name(name).removeprefix("bert."): name for name in model.state_dict()
        }
        tensors = read_tensors(directory)
        unused_heads = check_tensors(tensors, our_names)
        if "cls.predictions.bias" in our_names:  # the model has a head for masked tokens
            check_decoder(tensors)
        state = {our_names[name]: tensors[name] for name in tensors if name in our_names}
        model.missing_parameters = model.load_state_dict(state, strict=False).missing_keys
        check_encoder_is_complete(model.missing_parameters)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a tensor's shape differs
        # On one line, and without the advice that torch adds after a full stop.
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"no BERT can be read from {directory}: {reason}") from error

    if model.missing_parameters:
        names = ", ".join(model.missing_parameters)
        warnings.warn(f"initialized, not in {directory}: {names}", stacklevel=3)
    if unused_heads:
        warnings.warn(f"not used, of {directory}: {', '.join(unused_heads)}", stacklevel=3)
    return model.eval()


def is_hub_id(source: str) -> bool:
    """Returns whether a name can be a hub id, `name` or `owner/name`, and is not a local path.

    Where a folder runs/ exists, runs/bas is a mistyped path, and must not be looked up on the hub.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        return False
    return "/" not in source or not Path(Path(source).parts[0]).exists()


def fetch(source: str | Path) -> Path:
    """Returns a model's directory: `source` itself, or a download if `source` is a hub id."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    needed = "name a directory with config.json, model.safetensors and tokenizer.json"
    if not is_hub_id(str(source)):
        raise ValueError(f"{source} is no directory, and no id of the hub: {needed}")

    from huggingface_hub import snapshot_download

    print(f"fetching {source} from the hub", file=sys.stderr)
    try:
        # Many models have both kinds of weights. The .bin files are fetched only if there is no
        # safetensors file.
        for weight_files in ("model*.safetensors*", "pytorch_model*.bin*"):
            patterns = ["config.json", "tokenizer*.json", "vocab.txt", weight_files]
            directory = Path(snapshot_download(str(source), allow_patterns=patterns))
            if any(directory.glob(weight_files)):
                break
    except (OSError, ValueError) as error:  # no network, or no such id
        raise ValueError(
            f"{source} is no directory, and the hub does not give it: {needed}"
        ) from error
    return directory


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises ValueError or OSError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def read_config(directory: Path, changes: dict[str, Any]) -> tuple[BertConfig, int]:
    """Returns the config in config.json, with `changes`, and the id of the padding token.

    Raises ValueError if it belongs to another model or is inconsistent.
    """
    published = read_json(directory / "config.json")
    for key, value in FIXED_FIELDS.items():
        if published.get(key, value) != value:
            raise ValueError(f"{key} is {published[key]!r}, not {value!r}")
    if "hidden_size" not in published:
        raise ValueError("config.json has no 'hidden_size'")

    hidden_size = published["hidden_size"]
    # The defaults of d_k and d_v: only a config.json that was written here has values for them.
    values = {"attention_d_k": hidden_size, "attention_d_v": hidden_size}
    for field in fields(BertConfig):
        key = PUBLISHED_FIELDS.get(field.name, field.name)
        if key in published:
            values[field.name] = published[key]
    config = BertConfig(**{**values, **changes})

    padding_idx = published.get("pad_token_id") or 0  # it may be absent, or null
    if type(padding_idx) is not int or not 0 <= padding_idx < config.vocab_size:
        raise ValueError(f"pad_token_id is {padding_idx!r}, of {config.vocab_size} tokens")
    return config, padding_idx


def find_weights(directory: Path) -> list[Path]:
    """Returns the files with a model's tensors: one file, or several shards.

    The shards are those that an index file names or, without an index, all model-*-of-* files (or
    pytorch_model-*-of-*). Other files beside them (optimizers, adapters, older exports) are not the
    model's.
    """
    for name in WEIGHT_FILES:
        if (directory / name).exists():
            return [directory / name]

        index = directory / f"{name}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")  # from each tensor to its file
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index.name} names no shards")
            shards = sorted(directory / str(shard) for shard in set(weight_map.values()))
            missing = ", ".join(shard.name for shard in shards if not shard.exists())
            if missing:
                raise ValueError(f"shards that {index.name} names are missing: {missing}")
            return shards

        stem, _, suffix = name.rpartition(".")
        shards = sorted(directory.glob(f"{stem}-*-of-*.{suffix}"))
        if shards:
            return shards
    raise ValueError(f"it has neither {' nor '.join(WEIGHT_FILES)}")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Returns all tensors of a model, by published name without the prefix `bert.`.

    If the files hold only the copy of a tensor (`COPIES`), its original is returned as well.

    An old .bin file is a pickle. `weights_only` reads tensors from it and runs no code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in find_weights(directory):
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
                if not isinstance(content, dict):
                    raise ValueError(f"{file.name} holds no tensors by name")
                tensors |= {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        except (
            SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError, IndexError,
        ) as error:  # fmt: skip
            raise ValueError(f"{file.name}: {str(error) or type(error).__name__}") from error

    def current_name(name: str) -> str:
        name = name.removeprefix("bert.")
        name = re.sub(r"\.gamma$", ".weight", name)  # TensorFlow's names of LayerNorm
        return re.sub(r"\.beta$", ".bias", name)

    tensors = {current_name(name): tensor for name, tensor in tensors.items()}
    for copy, original in COPIES.items():
        if copy in tensors:
            tensors.setdefault(original, tensors[copy])
    return tensors


def check_tensors(tensors: dict[str, Tensor], known: Collection[str]) -> list[str]:
    """Returns the heads that the files have and the model does not, by published name.

    tensors: what the files hold. known: the published names that the model has.
    Raises ValueError if a tensor of the encoder is not known (the files have more layers than the
    config says), or if a known tensor is not made of finite floating-point numbers.
    """
    unknown = [name for name in tensors if name not in known and name not in REDUNDANT_TENSORS]
    encoder = sorted(name for name in unknown if name.startswith(("embeddings.", "encoder.")))
    if encoder:
        raise ValueError(f"the config has no place for {', '.join(encoder)}")

    for name, tensor in tensors.items():
        if name in known and not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}, not of floating-point numbers")
        if name in known and not tensor.isfinite().all():
            raise ValueError(f"{name} has a number that is not finite")

    # The first two words of a name: cls.predictions, cls.seq_relationship, classifier.weight.
    heads = {".".join(name.split(".")[:2]) for name in unknown}
    return sorted(heads)


def check_decoder(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError if a copy in the files differs from its original (`COPIES`): the decoder
    from the token embeddings, or one bias of the decoder from the other. A model here has one
    matrix and one bias for both.
    """
    for copy, original in COPIES.items():
        if copy in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise ValueError(f"it has a decoder of its own: {copy} differs from {original}")


def check_encoder_is_complete(missing: list[str]) -> None:
    """Raises ValueError if a parameter of the encoder is missing. The pooler and heads may be."""
    encoder = [name for name in missing if re.search(r"embeddings\.|layers\.", name)]
    if encoder:
        raise ValueError(f"a part of the encoder is missing: {', '.join(encoder)}")


# ---- Saving ------------------------------------------------------------------


def write_pretrained(model: PretrainedModel, directory: Path, tokenizer: Any) -> None:
    """Writes a model and its tokenizer in the published format, for `from_pretrained` and others.

    transformers opens the directory too, unless d_k or d_v differs from d_model: its BERT has no
    such option. Raises OSError if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = model.config
    if {config.attention_d_k, config.attention_d_v} != {config.d_model}:
        warnings.warn("d_k, d_v and d_model differ: only bert.py opens this", stacklevel=3)
    directory.mkdir(parents=True, exist_ok=True)

    tensors = {
        published_name(name): tensor.cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise OSError(f"{directory} cannot be written: {error}") from error

    tokenizer_json = tokenizer.to_str(pretty=True)
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    write_vocabulary(directory / "vocab.txt", tokenizer.get_vocab())
    normalizer = tokenizer.normalizer
    tokenizer_config = {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": config.max_seq_length,
        "do_lower_case": getattr(normalizer, "lowercase", False),
        "strip_accents": getattr(normalizer, "strip_accents", None),
        "tokenize_chinese_chars": getattr(normalizer, "handle_chinese_chars", True),
    }
    write_json(directory / "tokenizer_config.json", tokenizer_config)

    published = {PUBLISHED_FIELDS.get(name, name): v for name, v in asdict(config).items()}
    published |= FIXED_FIELDS
    published["architectures"] = [model.architecture]
    published["pad_token_id"] = model.padding_idx
    published["tokenizer_hash"] = tokenizer_hash(tokenizer)
    write_json(directory / "config.json", published)


def write_vocabulary(path: Path, vocabulary: dict[str, int]) -> None:
    """Writes vocab.txt: the id of a token is the number of its line, from 0. A vocabulary that
    leaves out an id, or has a token with a line break, cannot be written so: then there is no file
    afterwards.
    """
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    has_all_ids = [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    if has_all_ids and not any(set("\n\r") & set(token) for token in tokens):
        path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)  # of a tokenizer that was there before


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


# ---- Tokenizer and weights belong together -----------------------------------
#
# With another tokenizer, ids silently refer to different tokens, and accuracy drops without an
# error. So a model is saved with a hash of its tokenizer, and the training scripts compare it.
# A `tokenizer` here is one of the library tokenizers, as data.py's `load_tokenizer` returns it.


def vocabulary_hash(tokenizer: Any) -> str:
    """Returns sixteen hexadecimal digits that depend on every token and id of the vocabulary."""
    vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Returns a hash of vocabulary and normalizer, in which the tokenizers of BERTs differ.

    Two files that make the same tokenizer must get the same hash. strip_accents may be null, which
    means "the same as lowercase", so null is replaced by that value.
    """
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    if normalizer.get("type") == "BertNormalizer" and normalizer["strip_accents"] is None:
        normalizer["strip_accents"] = normalizer["lowercase"]
    effective = json.dumps(normalizer, sort_keys=True)
    digest = hashlib.sha256((vocabulary_hash(tokenizer) + effective).encode()).hexdigest()
    return f"v2-{digest[:16]}"


def is_tokenizer_of(tokenizer: Any, saved_hash: str) -> bool:
    """Returns whether a tokenizer has the hash that was saved with a model.

    A hash without "v2-", which older models have, is of the vocabulary alone.
    """
    if saved_hash.startswith("v2-"):
        return tokenizer_hash(tokenizer) == saved_hash
    return vocabulary_hash(tokenizer) == saved_hash


def check_tokenizer(model: PretrainedModel, tokenizer: Any) -> None:
    """Raises ValueError if the tokenizer does not fit: if an id has no embedding in the model, if
    there is no [PAD], or if [PAD] has another id than the model's `padding_idx`, so that the model
    would attend to padding and ignore an ordinary token. Another vocabulary of the same size is not
    noticed here.
    """
    vocabulary = tokenizer.get_vocab()
    if "[PAD]" not in vocabulary:
        raise ValueError("the tokenizer has no [PAD]")
    largest_id, rows = max(vocabulary.values()), model.config.vocab_size
    if largest_id >= rows:
        raise ValueError(f"the tokenizer has the id {largest_id}, the weights have {rows} tokens")
    padding_id = vocabulary["[PAD]"]
    if model.padding_idx != padding_id:
        raise ValueError(
            f"the model takes id {model.padding_idx} for padding (pad_token_id in config.json), the"
            f" tokenizer's [PAD] is id {padding_id}"
        )


# ---- Looking into a model ----------------------------------------------------


def parameter_counts(model: PretrainedModel) -> Counter[str]:
    """Returns how many parameters each part of a model has, all layers together. For example,
    `bert.layers.3.expand.bias` belongs to the part `layers.expand`.

    The tied matrix is one parameter and is counted once. What `from_pretrained` did not find is not
    counted; but for that, the counts add up to the whole model.
    """
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if name not in model.missing_parameters:
            module = name.removeprefix("bert.").removesuffix(".weight").removesuffix(".bias")
            words = [word for word in module.split(".") if not word.isdigit()]
            counts[".".join(words[:2])] += parameter.numel()
    return counts


@torch.no_grad()
def fill_masks(
    model: BertPretrainModel, tokenizer: Any, text: str, k: int = 5
) -> list[dict[str, float]]:
    """Returns, for each [MASK] in a text, the k most probable tokens and their probabilities.

    The model is in evaluation mode afterwards. Raises ValueError as `check_tokenizer` does, and if
    the tokenizer has no [MASK].
    """
    check_tokenizer(model, tokenizer)
    mask_id = tokenizer.token_to_id("[MASK]")
    if mask_id is None:
        raise ValueError("the tokenizer has no [MASK]")
    device = model.mlm_bias.device
    ids = tokenizer.encode(text).ids  # with [CLS] and [SEP]
    input_ids = torch.tensor([ids], device=device)  # (1, seq)
    positions = (input_ids[0] == mask_id).nonzero().flatten()
    mlm_logits, _ = model.eval()(input_ids, positions=positions)  # (masked, vocab)
    vocabulary = tokenizer.get_vocab()
    guesses = []
    for probs in mlm_logits.softmax(dim=-1).tolist():
        # Only ids of tokens are ranked: the weights may have more rows than there are tokens.
        best = sorted(vocabulary, key=lambda token: -probs[vocabulary[token]])[:k]
        guesses.append({token: probs[vocabulary[token]] for token in best})
    return guesses


def look(source: str, text: str) -> None:
    """Prints how many parameters each part of a model has, and its guesses for each [MASK]."""
    from data import load_tokenizer  # the only use of another file of this project

    text.encode()  # raises ValueError if the command line was not UTF-8
    directory = fetch(source)
    tokenizer = load_tokenizer(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing heads are handled below
        model = BertPretrainModel.from_pretrained(directory)
    check_tokenizer(model, tokenizer)

    counts = parameter_counts(model)
    for part, count in counts.items():
        print(f"{count:>13,}  {part}")
    print(f"{counts.total():>13,}  in all")

    if "[MASK]" not in text:
        return
    if any(name.startswith("mlm_") for name in model.missing_parameters):
        raise ValueError(f"{directory} has no head to fill a [MASK] with")
    for guesses in fill_masks(model, tokenizer, text):
        print("[MASK]  " + "  ".join(f"{token} {prob:.3f}" for token, prob in guesses.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bert.py", description="Counts a model's parameters and fills the masks of a text."
    )
    parser.add_argument("source", help="directory or hub id of a model")
    parser.add_argument("text", nargs="?", default="", help="with [MASK] for tokens to be guessed")
    arguments = parser.parse_args()
    try:
        look(arguments.source, arguments.text)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
