"""From examples to batches: an example depends only on the dataset's arguments and its index. An
epoch has every example once, in its own order. The number of workers or ranks changes no batch.
"""

import itertools
import time
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import VOCABULARY, corpus_of, examples, ids_of, seeds, small_tokenizer

import data
from data import PretrainDataset


def long_dataset(seed: int = 0) -> PretrainDataset:
    """Returns a dataset of 37 examples an epoch. [PAD] is the last token of its vocabulary."""
    tokenizer = data.wordpiece({token: i for i, token in enumerate(reversed(VOCABULARY))})
    return PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), tokenizer, 32, seed)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- An example ---------------------------------------------------------------------------------


def test_a_pair_needs_five_tokens():
    with pytest.raises(ValueError, match="max_seq_length=4"):
        PretrainDataset(corpus_of([[[5], [6]]] * 2), small_tokenizer(), 4)


@given(examples(), st.data())
def test_an_example_does_not_depend_on_its_batch_or_on_what_came_before(dataset, draw):
    """In a batch it is followed by padding: the tokenizer's [PAD], segment 0, and no label."""
    (pad,) = ids_of(dataset.tokenizer, "[PAD]")
    fills = {"input_ids": pad, "token_type_ids": 0, "mlm_labels": data.IGNORED_LABEL}
    indices = draw.draw(st.lists(st.integers(0, 2 * len(dataset) - 1), min_size=1, max_size=6))
    batch = data.collate([dataset[index] for index in indices], pad)
    assert equal(batch, dataset.batch(indices))
    for row, index in enumerate(indices):
        alone = dataset.batch([index])
        assert torch.equal(batch["nsp_labels"][row], alone["nsp_labels"][0])
        for name, fill in fills.items():
            width = alone[name].size(1)
            assert torch.equal(batch[name][row, :width], alone[name][0])
            assert (batch[name][row, width:] == fill).all()
    masked_indices = batch["masked_indices"]
    assert torch.equal(batch["mlm_labels"].flatten()[masked_indices], batch["mlm_targets"])
    assert len(masked_indices) == (batch["mlm_labels"] != data.IGNORED_LABEL).sum()


def test_examples_that_differ_in_seed_epoch_or_index_draw_other_numbers():
    """And the same three draw the same. All documents are alike, so only the draws can differ."""

    def example(seed: int, epoch: int, index: int) -> bytes:
        dataset = long_dataset(seed)
        example = dataset[epoch * len(dataset) + index]
        return example["input_ids"].tobytes() + example["mlm_labels"].tobytes()

    where = [*itertools.product((0, 1, 2**31, 2**63), (0, 1, 2), (0, 1, 2))]
    assert len({example(*place) for place in where}) == len(where)
    assert [example(*place) for place in where] == [example(*place) for place in where]


# ---- Epochs -------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 7), seeds, st.integers(1, 3), st.integers(0, 9))
def test_each_epoch_visits_every_example_once_for_any_ranks_and_start(
    size, batch, seed, world, start
):
    """The ranks' batches, taken in turn, are the batches of a single rank. A sampler that starts
    later yields the same batches as one that has run until then. So a run may go on with another
    number of ranks."""

    def batches(count, **options):
        sampler = data.EpochSampler(size, batch, seed, **options)
        return list(itertools.islice(sampler, count))

    steps = -(-3 * size // (batch * world)) + start
    ranks = [batches(steps, rank=rank, world_size=world) for rank in range(world)]
    in_turn = list(itertools.chain.from_iterable(zip(*ranks, strict=True)))
    assert in_turn == batches(steps * world)
    flat = list(itertools.chain.from_iterable(in_turn))
    for epoch in range(3):
        indices = flat[epoch * size : (epoch + 1) * size]
        assert sorted(indices) == list(range(epoch * size, (epoch + 1) * size))
    for rank, expected in enumerate(ranks):
        later = batches(steps - start, rank=rank, world_size=world, start=start)
        assert later == expected[start:]


def test_orders_of_epochs_and_of_seeds_differ():
    flat = next(iter(data.EpochSampler(200, 400, seed=0)))
    first, second = flat[:200], [n - 200 for n in flat[200:]]
    assert first != second
    assert first != sorted(first)
    assert first != next(iter(data.EpochSampler(200, 200, seed=1)))


# ---- Loaders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_yields_the_batches_of_its_rank_from_its_start_on(workers):
    dataset = long_dataset(seed=3)
    for part in ({"start": 2, "rank": 1, "world_size": 3}, {}):
        loader = data.get_split_dataloader(dataset, 4, **part, workers=workers)
        sampler = data.EpochSampler(len(dataset), 4, 3, **part)
        five = [itertools.islice(it, 5) for it in (loader, sampler)]
        for batch, indices in zip(*five, strict=True):
            assert equal(batch, dataset.batch(indices))
        # Without a limit, it would wait without end for a worker that cannot send its batch.
        assert loader.timeout == (data.WORKER_TIMEOUT if workers else 0)


def seconds_waited(batches: Iterable[dict]) -> float:
    """Returns the seconds in which a training loop that takes 30 ms a step waits for batches."""
    waited, iterator = 0.0, iter(batches)
    next(iterator)
    for _ in range(9):
        time.sleep(0.03)
        asked = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - asked
    return waited


def test_workers_prepare_batches_during_a_step_and_a_hand_written_buffer_does_not(
    monkeypatch,
):
    """A buffer that is filled whenever it is empty makes the loop wait for all of its batches."""
    dataset = long_dataset()
    collate = data.collate

    def slow_collate(*arguments, **keywords):
        time.sleep(0.02)
        return collate(*arguments, **keywords)

    def buffered():
        while True:
            yield from [dataset.batch(range(4)) for _ in range(3)]

    monkeypatch.setattr(data, "collate", slow_collate)
    assert seconds_waited(buffered()) >= 9 * 0.02
    assert seconds_waited(data.get_split_dataloader(dataset, 4, workers=1)) < 9 * 0.02 / 2
