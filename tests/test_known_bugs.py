"""Bugs that public BERT implementations or this one really have had, or that once no test noticed,
planted here one by one.

Each row changes one piece of the real source, and the named test must then fail. A row whose piece
is no longer in the source fails, too: a bug that cannot be planted proves nothing.
"""

import inspect
import textwrap
import warnings

import helpers
import pytest
import strategies
import test_corpus
import test_finetuning
import test_heads
import test_masks
import test_model
import test_order
import test_pairs
import test_ranks
import test_reference
import test_resume
import test_reviews
import test_speed
import test_streaming
import test_tokens
import test_training
import test_weights
from helpers import make_options
from hypothesis import Phase, settings
from strategies import CPU, publish, write_corpus

import bert
import data
import train_pretrain
import train_sst2

# Modules that may have imported a planted function by its name.
USERS = (
    helpers,
    strategies,
    test_corpus,
    test_finetuning,
    test_heads,
    test_masks,
    test_model,
    test_order,
    test_pairs,
    test_ranks,
    test_reference,
    test_resume,
    test_reviews,
    test_streaming,
    test_tokens,
    test_training,
    test_weights,
    train_pretrain,
    train_sst2,
)


def plant(monkeypatch, owner, name: str, old: str, new: str) -> None:
    """Replaces `old` by `new` in the source of a function or method."""
    function = inspect.getattr_static(owner, name)
    function = getattr(function, "__func__", function)  # of a classmethod
    function = getattr(function, "fget", function)  # of a property; its source has the decorator
    real = inspect.unwrap(function)  # without torch.no_grad
    source = textwrap.dedent(inspect.getsource(real))
    assert source.count(old) == 1, f"{old!r} is not in {name} exactly once"
    planted: dict = {}
    exec(source.replace(old, new), real.__globals__, planted)
    new_function = planted[name]
    monkeypatch.setattr(owner, name, new_function)
    for user in USERS:  # modules that have imported it by name
        if getattr(user, name, None) is function:
            monkeypatch.setattr(user, name, planted[name])


PASSED: set = set()  # tests that this process has run on the real source, with their arguments


class CaughtError(Exception):
    """The test noticed the bug."""


def run(test, arguments: dict) -> None:
    """Runs a test as it is, but a property without the search for its simplest counterexample.
    Arguments that are functions make what a fixture would have made, with the bug in place."""
    arguments = {k: v() if inspect.isfunction(v) else v for k, v in arguments.items()}
    if hasattr(test, "hypothesis"):
        quick = settings(settings.default, phases=[Phase.explicit, Phase.generate], database=None,
                         max_examples=60, print_blob=False)  # fmt: skip
        vars(test)["_hypothesis_internal_use_settings"] = quick
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            test(**arguments)
        except BaseException as error:
            raise CaughtError(f"{type(error).__name__}: {error}") from None


LAYER = (bert.EncoderLayer, "forward")
PRETRAIN = (bert.BertPretrainModel, "forward")
ATTENTION = (bert.MultiHeadAttention, "forward")
EXAMPLE = (data.PretrainDataset, "__getitem__")
COLUMNS = (data.PretrainDataset, "choose_columns")
FEED_FORWARD = "self.feed_forward_norm(x + self.dropout(computed))"
ENCODE = "encode_plain(tokenizer, split_sentences(text))"

BUGS = {
    "1 LayerNorm before the residual": (
        *LAYER, FEED_FORWARD,
        "x + self.feed_forward_norm(self.dropout(computed))",
        test_model.test_every_layer_hands_on_vectors_of_mean_0_and_variance_1, {},
    ),
    "2 pre-LayerNorm": (
        *LAYER, FEED_FORWARD, "x + self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))",
        test_reference.test_hidden_states_and_pooled_output_equal_those_of_transformers, {},
    ),
    "2 sinusoidal positions": (
        bert.Embeddings, "forward", "self.position.weight[:length]",
        "torch.sin(torch.arange(length))[:, None]",
        test_reference.test_hidden_states_and_pooled_output_equal_those_of_transformers, {},
    ),
    "3 the pooler feeds the masked language model": (
        *PRETRAIN, "nsp_logits = self.nsp(self.bert.pool(hidden_states))",
        "nsp_logits = self.nsp(self.bert.pool(hidden_states))\n"
        "    hidden_states = torch.tanh(self.bert.pooler(hidden_states))",
        test_heads.test_the_pooler_feeds_next_sentence_prediction_alone, {},
    ),
    "4 embeddings of N(0, 1)": (
        bert.PretrainedModel, "init_weights", "std=self.config.initializer_range", "std=1.0",
        test_heads.test_the_first_loss_is_ln_v_plus_ln_2, {"size": "tiny", "device": CPU},
    ),
    "5 an ignore_index of 0 for next sentence labels": (
        train_pretrain.PretrainLosses, "forward", 'batch["nsp_labels"], reduction',
        'batch["nsp_labels"], ignore_index=0, reduction',
        test_training.test_an_all_isnext_batch_has_an_nsp_gradient, {},
    ),
    "6 the same masks every epoch": (
        *EXAMPLE, "PURPOSE_EXAMPLE, epoch, index_in_epoch", "PURPOSE_EXAMPLE, 0, index_in_epoch",
        test_order.test_masks_differ_between_epochs_and_seeds_and_repeat_otherwise, {},
    ),
    "7 a blank line ends a document": (
        data, "encode_documents", "split_sentences(text, notes)",
        "split_sentences(text.split('\\n\\n')[0], notes)",
        test_corpus.test_blank_lines_do_not_end_a_document, {},
    ),
    "8 a random segment of the same document": (
        data, "draw_pair", "elsewhere += document_length", "pass",
        test_pairs.test_a_true_segment_b_follows_and_a_random_one_is_from_another_document, {},
    ),
    "9 special tokens as random replacements": (
        data.PretrainDataset, "__post_init__", "vocabulary.keys() - set(SPECIAL_TOKENS)",
        "vocabulary.keys()",
        test_masks.test_special_tokens_are_never_masked_and_never_drawn, {},
    ),
    "10 special tokens can be masked": (
        *COLUMNS, "np.concatenate([columns[1:first_sep], columns[first_sep + 1 : -1]])", "columns",
        test_masks.test_special_tokens_are_never_masked_and_never_drawn, {},
    ),
    "11 independent draws: 81, 10, 9": (
        data, "mask_tokens", "draw < 0.8,", "draw < 0.81,",
        test_masks.test_of_the_masked_80_percent_become_mask_10_a_random_token_and_10_stay,
        {"large_batch": test_masks.make_large_batch},
    ),
    "12 each token masked with probability 0.15": (
        *COLUMNS, "rng.permutation(candidates)[:masked_count]",
        "candidates[rng.random(len(candidates)) < 0.15]",
        test_masks.test_exactly_15_percent_of_the_candidates_are_masked_and_at_least_one, {},
    ),
    "13 a whole word across [SEP]": (
        *COLUMNS, "continues_word[[0, first_of_b]]", "continues_word[[0]]",
        test_masks.test_a_word_never_reaches_across_sep, {},
    ),
    "14 the last [SEP] is cut off": (
        *EXAMPLE, "\"input_ids\": corrupted", "\"input_ids\": corrupted[:-1]",
        test_pairs.test_an_example_is_cls_segment_a_sep_segment_b_sep_and_padding, {},
    ),
    "15 no attention mask": (
        *ATTENTION, "(q, k, v, mask, dropout)\n    else", "(q, k, v, None, dropout)\n    else",
        test_model.test_padding_never_changes_the_outputs_of_real_tokens, {},
    ),
    "15 the attention mask hides queries": (
        *ATTENTION, "(q, k, v, mask, dropout)\n    else",
        "(q, k, v, mask.transpose(-1, -2), dropout)\n    else",
        test_model.test_padding_never_changes_the_outputs_of_real_tokens, {},
    ),
    "16 dropout in evaluation": (
        train_pretrain, "evaluate", "model.eval()", "model.train()",
        test_training.test_evaluation_changes_nothing_and_repeats, {},
    ),
    "17 weight decay on everything": (
        train_pretrain, "make_optimizer", '"weight_decay": 0.0}', '"weight_decay": 0.01}',
        test_training.test_weight_decay_spares_biases_and_norms_and_nothing_else, {},
    ),
    "17 coupled decay": (
        train_pretrain, "make_optimizer", "torch.optim.AdamW(groups", "torch.optim.Adam(groups",
        test_training.test_a_step_without_gradient_shrinks_exactly_what_decays, {},
    ),
    "18 the first step has learning rate 0": (
        train_pretrain, "learning_rate", "(step + 1)", "step",
        test_training.test_the_learning_rate_rises_to_the_peak_and_falls_towards_zero, {},
    ),
    "18 no decay of the learning rate": (
        train_pretrain, "learning_rate", "(steps - step) / (steps - warmup)", "1",
        test_training.test_the_learning_rate_rises_to_the_peak_and_falls_towards_zero, {},
    ),
    "19 the model is pickled": (
        bert, "write_pretrained",
        '(directory / "model.safetensors").write_bytes(weights)',
        'torch.save(model, directory / "model.safetensors")',
        test_weights.test_what_is_saved_is_what_is_loaded, {"cls": bert.Bert},
    ),
    "20 another prefix, and nothing is loaded": (
        bert, "load_pretrained", "    if wrong:", "    if False:",
        test_weights.test_an_encoder_that_is_not_complete_is_rejected_by_what_it_lacks,
        {"cls": bert.Bert},
    ),
    "21 another tokenizer for fine-tuning": (
        train_pretrain, "check_options", "if None not in (options.weights, options.tokenizer):",
        "if False:",
        test_weights.test_a_tokenizer_beside_the_weights_is_the_only_one,
        {"of_script": train_sst2.SST2Options},
    ),
    "22 a bad row is swallowed": (
        data, "as_text", 'raise ValueError(f"', 'text = str(f"',
        test_corpus.test_a_poisoned_document_surfaces_with_its_index, {},
    ),
    "23 perplexity of both losses": (
        train_pretrain, "evaluate", 'tensor(metrics["mlm_loss"])',
        'tensor(metrics["mlm_loss"] + metrics["nsp_loss"])',
        test_training.test_metrics_are_means_over_all_masked_tokens_and_all_pairs, {},
    ),
    "24 a mean of micro-batches' means": (
        train_pretrain, "add_gradients", "mlm_sum / masked",
        "mlm_sum / len(batch['masked_indices']) / len(micro_batches)",
        test_training.test_accumulated_gradients_are_those_of_the_whole_batch, {},
    ),
    "25 a restart repeats the data": (
        data.EpochSampler, "__iter__", "self.start * self.world_size + self.rank", "self.rank",
        test_order.test_each_epoch_visits_every_example_once_for_any_ranks_and_start, {},
    ),
    "26 the lowest accuracy is the best": (
        train_sst2, "best_epoch", "argmax", "argmin",
        test_finetuning.test_the_epoch_with_the_highest_accuracy_is_kept, {},
    ),
    "27 the same order every epoch": (
        train_sst2.SST2Batches, "__iter__", "self.epoch, 0)", "0, 0)",
        test_reviews.test_bucket_orders_differ_by_epoch_and_seed_and_batches_are_of_similar_length,
        {},
    ),
    "28 workers without a shard yield nothing": (
        data, "get_split_dataloader", "readers > shards", "False",
        test_streaming.test_more_readers_than_shards_are_rejected, {},
    ),
    "29 a resumed stream starts at its beginning": (
        train_pretrain, "make_batches", "trained_on - first", "0",
        test_streaming.test_a_resumed_run_reads_a_stream_again_and_skips_what_it_has_trained_on,
        {"workers": 0},
    ),
    "31 a random pair is cut to fit both documents, a true one its own": (
        data, "draw_pair",
        "    coin_b = int(rng.integers(2))\n",
        "    coin_b = int(rng.integers(2))\n"
        "    if coin_a == coin_b:\n"
        "        here = other if coin_b else seam\n"
        "        length_b = min(target - length_a, here.document_end - here.offset)\n",
        test_pairs.test_both_lengths_tell_nothing_about_the_label,
        {"drawn": lambda: test_pairs.draw_kind("hardly longer than a pair")},
    ),
    "31 segment A is always from where the offset was drawn, and only B may be elsewhere": (
        data, "draw_pair", "coin_a = int(rng.integers(2))", "coin_a = 0",
        test_pairs.test_segment_b_tells_nothing_about_the_label,
        {"drawn": lambda: test_pairs.draw_kind("two documents")},
    ),
    "31 segment A starts a document, segment B ends another, and so the pair is random": (
        data, "draw_pair", "max(2, room_before + room_after - 1)", "room_before + room_after",
        test_pairs.test_a_pair_never_starts_one_document_and_ends_another, {},
    ),
    "32 the corpus is divided by a floored quotient": (
        *EXAMPLE, "(index_in_epoch + 1) * len(self.corpus) // size",
        "(index_in_epoch + 1) * (len(self.corpus) // size)",
        test_pairs.test_the_examples_of_an_epoch_share_the_corpus_and_leave_nothing_out, {},
    ),
    "33 a drawn offset is where segment A starts": (
        data, "draw_pair", "seam = find_seam(corpus, int(rng.integers(start, end)))",
        "offset = int(rng.integers(start, end))\n"
        "    last = span_around(corpus.document_starts, offset)[1] - 1\n"
        "    seam = find_seam(corpus, min(offset + target // 2, last))",
        test_pairs.test_the_first_and_last_twenty_tokens_are_drawn_at_least_0_35_times_the_mean, {},
    ),
    "34 the group of ranks has the accelerator's backend alone": (
        train_pretrain, "join_ranks", '"cpu:gloo,cuda:nccl"', '"nccl"',
        test_ranks.test_cpu_tensors_have_a_backend_on_every_machine,
        {"device": None, "gpus": 1, "backend": "cpu:gloo,cuda:nccl"},
    ),
    "35 the model's padding id is not that of the batches": (
        train_pretrain, "make_model", "options.weights, padding_idx,", "options.weights, None,",
        test_weights.test_padding_is_the_tokenizers_whatever_the_config_says, {},
    ),
    "36 a cased checkpoint is lowercased": (
        data, "check_tokens", "token != token.lower()", "False",
        test_tokens.test_a_lowercasing_tokenizer_with_cased_tokens_is_rejected_whatever_file_it_is_from,
        {"file": "tokenizer.json"},
    ),
    "36 a cased checkpoint without tokenizer.json is lowercased": (
        data, "load_tokenizer", "if name in about", "if False",
        test_tokens.test_a_vocabulary_is_cased_if_its_config_says_so,
        {"tokenizer_config": {"do_lower_case": False}, "ids": ["A", "é"]},
    ),
    "37 layers that the config has no place for are dropped": (
        bert, "load_pretrained", "[*our_names, *unused]", "our_names",
        test_weights.test_a_part_of_the_encoder_that_the_config_has_no_place_for_is_named, {},
    ),
    "38 resuming without a checkpoint starts anew": (
        train_pretrain, "check_folder", 'if resume and not (out / "checkpoint.pt").exists():',
        "if False:",
        test_resume.test_resuming_without_a_checkpoint_is_rejected_and_touches_nothing,
        {"has_folder": True},
    ),
    "40 another corpus of the same lengths is taken for the same": (
        data.TokenizedCorpus, "key", "array.tobytes() for array", "len(array) for array",
        test_corpus.test_the_key_of_a_corpus_in_memory_changes_with_every_token_and_start, {},
    ),
    "41 fine-tuning is validated on what it was trained on": (
        train_sst2, "train", 'load(options.dataset, "validation"',
        'load(options.dataset, "train"',
        test_finetuning.test_accuracy_is_that_of_the_validation_split, {},
    ),
    "42 the last epoch is kept, not the best": (
        train_sst2, "fine_tune", "copy.deepcopy(model)", "model",
        test_finetuning.test_the_model_of_the_best_epoch_is_returned, {},
    ),
    "43 every epoch of fine-tuning has the same order": (
        train_sst2, "fine_tune", "training.epoch = epoch", "training.epoch = 0",
        test_finetuning.test_every_epoch_and_every_seed_have_an_order_of_their_own, {},
    ),
    "43 every seed of fine-tuning has the same order": (
        train_sst2, "fine_tune", "training.seed = seed", "training.seed = 0",
        test_finetuning.test_every_epoch_and_every_seed_have_an_order_of_their_own, {},
    ),
    "44 every seed of fine-tuning has the same initial weights": (
        train_sst2, "train", "torch.manual_seed(seed)", "torch.manual_seed(0)",
        test_finetuning.test_every_seed_starts_from_weights_of_its_own_and_the_same_at_every_rate,
        {},
    ),
    "45 one dropout mask for all steps of fine-tuning": (
        train_sst2, "fine_tune", "set_seed(seed, step)", "set_seed(seed)",
        test_finetuning.test_every_step_and_every_seed_have_a_dropout_mask_of_their_own, {},
    ),
    "45 one dropout mask for all steps of pretraining": (
        train_pretrain, "train", "(options.seed, step, rank", "(options.seed, rank",
        test_training.test_every_micro_batch_of_every_step_has_a_dropout_mask_of_its_own, {},
    ),
    "46 fine-tuning without warmup": (
        train_sst2, "fine_tune", "warmup = steps // 10", "warmup = 0",
        test_finetuning.test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_0, {},
    ),
    "47 Adam's eps is that of torch": (
        train_pretrain, "make_optimizer", "eps=1e-6", "eps=1e-8",
        test_training.test_adam_has_the_numbers_of_google_code, {},
    ),
    "48 an evaluation with dropout": (
        train_sst2, "evaluate", "model.eval()", "model.train()",
        test_finetuning.test_an_evaluation_has_no_dropout_and_training_continues_with_it, {},
    ),
    "49 the spread of a few seeds is divided by n": (
        train_sst2, "train", "ddof=1", "ddof=0",
        test_finetuning.test_every_seed_starts_from_weights_of_its_own_and_the_same_at_every_rate,
        {},
    ),
    "50 a stream's block is not shuffled": (
        data.Stream, "__iter__", "permutation(dataset.seed, block, len(dataset)).tolist()",
        "range(len(dataset))",
        test_streaming.test_every_example_of_a_block_comes_once_in_a_random_order, {},
    ),
    "51 all workers of a stream draw the same numbers": (
        data.Stream, "__iter__", "self.rank * workers + worker", "0",
        test_streaming.test_workers_that_read_equal_documents_make_other_examples_of_them, {},
    ),
    "54 the clock of a resumed run starts again": (
        train_pretrain, "train", "perf_counter() - progress.seconds", "perf_counter()",
        test_resume.test_the_clock_and_the_count_of_tokens_of_a_resumed_run_go_on, {},
    ),
    "54 the count of tokens of a resumed run starts again": (
        train_pretrain, "pretrain", '**state["progress"]', '**{**state["progress"], "tokens": 0}',
        test_resume.test_the_clock_and_the_count_of_tokens_of_a_resumed_run_go_on, {},
    ),
    "55 pretraining gives freed memory back": (
        train_pretrain, "pretrain", "    keep_freed_memory()\n", "",
        test_speed.test_both_scripts_keep_freed_memory_before_they_train, {},
    ),
    "55 fine-tuning gives freed memory back": (
        train_sst2, "train", "    keep_freed_memory()\n", "",
        test_speed.test_both_scripts_keep_freed_memory_before_they_train, {},
    ),
    "56 data workers stay in the group of the run": (
        train_pretrain, "leave_group", "os.setpgrp()", "pass",
        test_ranks.test_data_workers_are_in_groups_of_their_own, {"streaming": False},
    ),
    "56 data workers of a stream stay in the group of the run": (
        train_pretrain, "leave_group", "os.setpgrp()", "pass",
        test_ranks.test_data_workers_are_in_groups_of_their_own, {"streaming": True},
    ),
    "57 a line has the number of updates before it": (
        train_pretrain, "train", "progress.step = done", "progress.step = step",
        test_training.test_lines_count_updates_and_come_as_often_as_asked_and_at_the_end,
        {"log_every": 1, "eval_every": 5, "training": [1, 2, 3, 4, 5], "validation": [0, 5]},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    """The test passes on the real source and fails on the planted one."""
    owner, name, old, new, test, arguments = BUGS[bug]
    needed = inspect.signature(test).parameters

    def run_in(folder: str) -> None:
        (tmp_path / folder).mkdir()
        shards = test_streaming.write_shards(tmp_path / "shards")
        corpus = write_corpus(tmp_path / folder / "corpus")
        fixtures = {
            "tmp_path": tmp_path / folder,
            "folder": shards,
            "monkeypatch": monkeypatch,
            "published": publish(tmp_path / folder / "published"),
            "options": make_options(corpus, tmp_path / folder / "run"),
        }
        given = {name: fixture for name, fixture in fixtures.items() if name in needed}
        run(test, {**arguments, **given})

    if (test, str(arguments)) not in PASSED:  # several bugs are for the same test
        run_in("real")
        PASSED.add((test, str(arguments)))
    plant(monkeypatch, owner, name, old, new)
    with pytest.raises(CaughtError):
        run_in("planted")
