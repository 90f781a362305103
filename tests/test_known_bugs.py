"""Real bugs of public BERT implementations or of this one, and bugs that once no test caught,
planted here one by one.

Each row changes one piece of the real source, and the named test must then fail: with an assertion,
or with an exception listed in the row. If the piece is no longer in the source, the row fails, too:
a bug that cannot be planted proves nothing. Simpler changes are left to a mutation tester.
"""

import importlib
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_pairs
from helpers import make_options
from hypothesis import Phase, settings
from strategies import CPU, publish, write_corpus

import bert
import data
import train_pretrain
import train_sst2
from train_sst2 import SST2Options

TESTS = Path(__file__).parent


class Bug(NamedTuple):
    """`old` becomes `new` in the source of a function of a module or class; `test` must notice."""

    owner: Any
    name: str
    old: str
    new: str
    test: str
    arguments: dict = {}  # noqa: RUF012
    caught_as: tuple = ()  # exceptions, besides a failed assertion


def find_test(name: str) -> Callable:
    """Returns a test, whichever file it is in."""
    files = [file for file in TESTS.glob("test_*.py") if f"def {name}(" in file.read_text()]
    (file,) = files
    return getattr(importlib.import_module(file.stem), name)


def plant(monkeypatch, bug: Bug) -> None:
    """Replaces `old` by `new` wherever the function is used."""
    function = inspect.getattr_static(bug.owner, bug.name)
    function = getattr(function, "__func__", function)  # of a classmethod
    function = getattr(function, "fget", function)  # of a property; its source has the decorator
    real = inspect.unwrap(function)  # without torch.no_grad
    source = textwrap.dedent(inspect.getsource(real))
    assert source.count(bug.old) == 1, f"{bug.old!r} is not in {bug.name} exactly once"
    source = source.replace(bug.old, bug.new)
    source = source.replace("super()", f"super({bug.owner.__name__}, self)")
    planted: dict = {}
    exec(source, real.__globals__, planted)
    monkeypatch.setattr(bug.owner, bug.name, planted[bug.name])
    for user in list(sys.modules.values()):  # modules that have imported it by name
        if getattr(user, "__dict__", {}).get(bug.name) is function:
            monkeypatch.setattr(user, bug.name, planted[bug.name])


def run(test: Callable, arguments: dict, folder: Path, examples: int) -> None:
    """Runs a test with its arguments and fixtures. Counterexamples of a hypothesis test are not
    shrunk. An argument that is a function is called, with the bug in place, to get its value.
    """
    folder.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(test, "hypothesis"):
            quick = settings(settings.default, phases=[Phase.explicit, Phase.generate],
                             database=None, max_examples=examples, print_blob=False,
                             report_multiple_bugs=False)  # fmt: skip
            monkeypatch.setattr(test, "_hypothesis_internal_use_settings", quick)
        fixtures = {
            "tmp_path": lambda: folder,
            "monkeypatch": lambda: monkeypatch,
            "published": lambda: publish(folder / "published"),
            "options": lambda: make_options(write_corpus(folder / "corpus"), folder / "run"),
        }
        needed = [name for name in fixtures if name in inspect.signature(test).parameters]
        given = {k: v() if inspect.isfunction(v) else v for k, v in arguments.items()}
        test(**given, **{name: fixtures[name]() for name in needed})


LAYER = (bert.EncoderLayer, "forward")
PRETRAIN = (bert.BertPretrainModel, "forward")
ATTENTION = (bert.MultiHeadAttention, "forward")
EXAMPLE = (data.PretrainDataset, "__getitem__")
COLUMNS = (data.PretrainDataset, "choose_columns")
FEED_FORWARD = "self.feed_forward_norm(x + self.dropout(computed))"

BUGS = {
    "LayerNorm before the residual": Bug(
        *LAYER, FEED_FORWARD, "x + self.feed_forward_norm(self.dropout(computed))",
        "test_the_encoder_returns_vectors_of_mean_0_and_variance_1",
    ),
    "pre-LayerNorm": Bug(
        *LAYER, FEED_FORWARD, "x + self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))",
        "test_hidden_states_and_pooled_output_equal_those_of_transformers",
    ),
    "sinusoidal positions": Bug(
        bert.Embeddings, "forward", "self.position.weight[:length]",
        "torch.sin(torch.arange(length))[:, None]",
        "test_hidden_states_and_pooled_output_equal_those_of_transformers",
    ),
    "the pooler feeds the masked language model": Bug(
        *PRETRAIN, "nsp_logits = self.nsp(self.bert.pool(hidden_states))",
        "nsp_logits = self.nsp(self.bert.pool(hidden_states))\n"
        "    hidden_states = torch.tanh(self.bert.pooler(hidden_states))",
        "test_the_pooler_feeds_next_sentence_prediction_alone",
    ),
    "embeddings of N(0, 1)": Bug(
        bert.PretrainedModel, "init_weights", "std=self.config.initializer_range", "std=1.0",
        "test_the_first_loss_is_ln_v_plus_ln_2", {"size": "tiny", "device": CPU},
    ),
    "an ignore_index of 0 for next sentence labels": Bug(
        train_pretrain.PretrainLosses, "forward", 'batch["nsp_labels"], reduction',
        'batch["nsp_labels"], ignore_index=0, reduction',
        "test_an_all_isnext_batch_has_an_nsp_gradient",
    ),
    "the same masks every epoch": Bug(
        *EXAMPLE, "PURPOSE_EXAMPLE, epoch, index_in_epoch", "PURPOSE_EXAMPLE, 0, index_in_epoch",
        "test_examples_that_differ_in_seed_epoch_or_index_draw_other_numbers",
    ),
    "a blank line ends a document": Bug(
        data, "encode_documents", "iter(documents)",
        "iter(p for d in documents for p in d.split('\\n\\n'))",
        "test_blank_lines_do_not_end_a_document", caught_as=(ValueError,),
    ),
    "a random segment B may be from the same document": Bug(
        data, "draw_pair", "elsewhere += document_length", "pass",
        "test_a_true_segment_b_follows_and_a_random_one_is_from_another_document",
    ),
    "special tokens as random replacements": Bug(
        data.PretrainDataset, "__post_init__", "vocabulary.keys() - set(SPECIAL_TOKENS)",
        "vocabulary.keys()",
        "test_special_tokens_are_never_masked_and_never_drawn",
    ),
    "special tokens can be masked": Bug(
        *COLUMNS, "np.concatenate([columns[1:first_sep], columns[first_sep + 1 : -1]])", "columns",
        "test_special_tokens_are_never_masked_and_never_drawn",
    ),
    "each token masked with probability 0.15": Bug(
        *COLUMNS, "rng.permutation(candidates)[:masked_count]",
        "candidates[rng.random(len(candidates)) < 0.15]",
        "test_exactly_15_percent_of_the_candidates_are_masked_and_at_least_one",
    ),
    "a whole word across [SEP]": Bug(
        *COLUMNS, "continues_word[[0, first_of_b]]", "continues_word[[0]]",
        "test_a_word_never_reaches_across_sep",
    ),
    "the last [SEP] is cut off": Bug(
        *EXAMPLE, "segment_b, [self.sep_id]]", "segment_b]",
        "test_an_example_is_cls_segment_a_sep_segment_b_sep_and_padding",
    ),
    "no attention mask": Bug(
        *ATTENTION, "(q, k, v, mask, dropout)\n    else", "(q, k, v, None, dropout)\n    else",
        "test_padding_never_changes_the_outputs_of_real_tokens",
    ),
    "the attention mask hides queries": Bug(
        *ATTENTION, "(q, k, v, mask, dropout)\n    else",
        "(q, k, v, mask.transpose(-1, -2), dropout)\n    else",
        "test_padding_never_changes_the_outputs_of_real_tokens",
    ),
    "dropout in evaluation": Bug(
        train_pretrain, "evaluate", "model.eval()", "model.train()",
        "test_evaluating_a_model_uses_no_dropout_and_no_gradients_and_keeps_its_mode",
        {"was_training": True},
    ),
    "coupled decay": Bug(
        train_pretrain, "make_optimizer", "torch.optim.AdamW(groups", "torch.optim.Adam(groups",
        "test_a_step_with_gradients_of_0_shrinks_exactly_what_decays", {"optimizer": "adamw"},
    ),
    "a first step with the learning rate 0": Bug(
        train_pretrain, "learning_rate", "(step + 1) / warmup", "step / warmup",
        "test_the_learning_rate_rises_to_the_peak_and_falls_towards_zero",
    ),
    "the model is pickled": Bug(
        bert, "write_pretrained", '(directory / "model.safetensors").write_bytes(weights)',
        'torch.save(model, directory / "model.safetensors")',
        "test_what_is_saved_is_what_is_loaded", {"cls": bert.Bert}, caught_as=(ValueError,),
    ),
    "an encoder that the file has under other names is not loaded": Bug(
        bert, "load_pretrained", "if wrong:", "if wrong and False:",
        "test_an_encoder_that_is_not_complete_is_rejected_by_what_it_lacks", {"cls": bert.Bert},
    ),
    "another tokenizer than that of the weights": Bug(
        train_pretrain, "check_options", 'raise ValueError("--tok', 'str("--tok',
        "test_a_tokenizer_beside_the_weights_is_the_only_one", {"of_script": SST2Options},
    ),
    "a bad row is swallowed": Bug(
        data.Documents, "texts", 'raise ValueError(f"', 'text = str(f"',
        "test_a_poisoned_row_surfaces_with_its_index",
    ),
    "perplexity of both losses": Bug(
        train_pretrain, "evaluate", 'tensor(metrics["mlm_loss"])',
        'tensor(metrics["mlm_loss"] + metrics["nsp_loss"])',
        "test_metrics_are_means_over_all_masked_tokens_and_all_pairs",
    ),
    "a mean of micro-batches' means": Bug(
        train_pretrain, "add_gradients", "mlm_sum / masked",
        "mlm_sum / len(batch['masked_indices']) / len(micro_batches)",
        "test_accumulated_gradients_are_those_of_the_whole_batch",
    ),
    "a resumed run starts the data anew": Bug(
        train_pretrain, "make_batches", "start * options.accumulate // ranks", "0",
        "test_a_run_killed_at_any_write_resumes_to_the_same_bits",
    ),
    "the epoch with the lowest accuracy is the best": Bug(
        train_sst2, "fine_tune", 'metrics["accuracy"] > best_accuracy',
        'best_accuracy < 0 or metrics["accuracy"] < best_accuracy',
        "test_the_model_of_the_best_epoch_is_returned", {"accuracies": (0.5, 0.9, 0.7), "best": 1},
    ),
    "the same order every epoch": Bug(
        train_sst2.SST2Batches, "__iter__", "self.epoch, 0)", "0, 0)",
        "test_bucket_orders_differ_by_epoch_and_seed_and_batches_are_of_similar_length",
    ),
    "a random pair is cut to fit both documents, a true one its own": Bug(
        data, "draw_pair", "    coin_b = int(rng.integers(2))\n",
        "    coin_b = int(rng.integers(2))\n"
        "    if coin_a == coin_b:\n"
        "        here = other if coin_b else seam\n"
        "        length_b = min(target - length_a, here.document_end - here.offset)\n",
        "test_each_coin_says_where_one_segment_is_and_their_xor_is_the_label",
    ),
    "segment A is always from where the offset was drawn, and only B may be elsewhere": Bug(
        data, "draw_pair", "coin_a = int(rng.integers(2))", "coin_a = 0",
        "test_one_segment_tells_nothing_about_the_label",
        {"first": 2, "drawn": lambda: test_pairs.draw_kind("two documents")},
    ),
    "segment A starts a document, segment B ends another, and so the pair is random": Bug(
        data, "draw_pair", "max(2, longest_a + longest_b - 1)", "longest_a + longest_b",
        "test_a_pair_never_starts_one_document_and_ends_another",
    ),
    "the corpus is divided by a floored quotient": Bug(
        *EXAMPLE, "(index_in_epoch + 1) * len(self.corpus) // size",
        "(index_in_epoch + 1) * (len(self.corpus) // size)",
        "test_the_examples_of_an_epoch_share_the_corpus_and_leave_nothing_out",
    ),
    "a drawn offset is where segment A starts": Bug(
        data, "draw_pair", "seam = find_seam(corpus, int(rng.integers(start, end)))",
        "offset = int(rng.integers(start, end))\n"
        "    last = span_around(corpus.document_starts, offset)[1] - 1\n"
        "    seam = find_seam(corpus, min(offset + target // 2, last))",
        "test_the_first_and_last_twenty_tokens_are_drawn_at_least_0_35_times_the_mean",
    ),
    "a machine with a GPU has no backend for tensors on the CPU": Bug(
        train_pretrain, "join_ranks", '"cpu:gloo,cuda:nccl"', '"nccl"',
        "test_cpu_tensors_have_a_backend_on_every_machine",
        {"device": None, "gpus": 1, "backend": "cpu:gloo,cuda:nccl"},
    ),
    "padding is that of config.json": Bug(
        train_pretrain, "make_model", "options.weights, padding_idx", "options.weights, None",
        "test_padding_is_the_tokenizers_whatever_the_config_says",
    ),
    "cased tokens are lowercased": Bug(
        data, "check_tokens", "if cased and lowercases", "if False",
        "test_a_lowercasing_tokenizer_with_cased_tokens_is_rejected_whatever_file_it_is_from",
        {"file": "vocab.txt"},
    ),
    "layers that the config has no place for are dropped": Bug(
        bert, "load_pretrained", "{*our_names, *unused}", "{*our_names}",
        "test_a_part_of_the_encoder_that_the_config_has_no_place_for_is_named",
    ),
    "resuming where nothing is left starts a run": Bug(
        train_pretrain, "pretrain", "on_rank_0(check_folder, out, options.resume)",
        'options = replace(options, resume=(out / "checkpoint.pt").exists())',
        "test_resuming_without_a_checkpoint_is_rejected_and_touches_nothing", {"has_folder": False},
    ),
    "another corpus of the same lengths is taken for the same": Bug(
        data.TokenizedCorpus, "key", "array.tobytes() for array", "len(array) for array",
        "test_the_key_of_a_corpus_in_memory_changes_with_every_token_and_start",
    ),
    "layer_norm_eps is ignored": Bug(
        bert.EncoderLayer, "__init__",
        "attention_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)",
        "attention_norm = nn.LayerNorm(config.d_model)",
        "test_hidden_states_and_pooled_output_equal_those_of_transformers",
    ),
    "batches are padded with 0": Bug(
        data.PretrainDataset, "__post_init__", "vocabulary[PAD]", "0",
        "test_an_example_is_cls_segment_a_sep_segment_b_sep_and_padding",
    ),
}  # fmt: skip

PASSED: set = set()  # tests that this process has run on the real source, with their arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, monkeypatch, tmp_path):
    """The test passes on the real source and fails on the planted one."""
    bug = BUGS[name]
    test = find_test(bug.test)  # in test_reference it is skipped without transformers
    if (test, str(bug.arguments)) not in PASSED:  # several bugs are for the same test
        run(test, bug.arguments, tmp_path / "real", 5)
        PASSED.add((test, str(bug.arguments)))
    plant(monkeypatch, bug)
    with pytest.raises((AssertionError, pytest.fail.Exception, *bug.caught_as)):
        run(test, bug.arguments, tmp_path / "planted", 100)
