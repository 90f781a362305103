"""From examples to batches: an example is a pure function of (corpus, seed, index), and an epoch
has every example once, in an order of its own. No number of workers or ranks changes the batches.
"""

import hashlib
import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    LETTERS,
    corpus_of,
    documents,
    lengths,
    review_batches,
    seeds,
    small_tokenizer,
    write_rows,
)

import data
from data import PretrainDataset


def indices_of(dataset: PretrainDataset, epochs: int = 2) -> list[int]:
    return list(range(epochs * len(dataset)))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- An example ---------------------------------------------------------------------------------


def test_a_pair_needs_five_tokens():
    with pytest.raises(ValueError, match="max_seq_length=4"):
        PretrainDataset(corpus_of([[[5], [6]]] * 2), small_tokenizer(), 4)


@given(documents(), lengths, seeds, st.data())
def test_an_example_does_not_depend_on_its_batch_or_on_what_came_before(docs, length, seed, draw):
    dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), length, seed)
    indices = draw.draw(st.lists(st.sampled_from(indices_of(dataset)), min_size=1, max_size=6))
    batch = dataset.batch(indices)
    for row, index in enumerate(indices):
        alone = {name: v[0] for name, v in dataset.batch([index]).items()}
        for name, values in batch.items():
            width = alone[name].numel()
            assert torch.equal(values[row].flatten()[:width], alone[name].flatten())


def test_masks_differ_between_epochs_and_seeds_and_repeat_otherwise():
    corpus = corpus_of([[[7] * 9] * 30] * 4)
    assert PretrainDataset(corpus, small_tokenizer(), 32).seed == 0
    first = PretrainDataset(corpus, small_tokenizer(), 32, seed=1)
    again = PretrainDataset(corpus, small_tokenizer(), 32, seed=1)
    other = PretrainDataset(corpus, small_tokenizer(), 32, seed=2)
    epoch = list(range(len(first)))
    later = [n + len(first) for n in epoch]
    assert equal(first.batch(epoch), again.batch(epoch))
    assert not equal(first.batch(epoch), first.batch(later))
    assert not equal(first.batch(epoch), other.batch(epoch))


# ---- Random numbers -----------------------------------------------------------------------------


def test_examples_that_differ_in_seed_epoch_or_index_draw_other_numbers():
    """The same offset is drawn for a corpus of one part, and the same length, otherwise."""
    corpus = corpus_of([[[7] * 9] * 30] * 4)

    def example(seed: int, epoch: int, index: int) -> bytes:
        dataset = PretrainDataset(corpus, small_tokenizer(), 32, seed)
        example = dataset[epoch * len(dataset) + index]
        return example["input_ids"].tobytes() + example["mlm_labels"].tobytes()

    where = [*itertools.product((0, 1, 2**31, 2**63), (0, 1, 2), (0, 1, 2))]
    assert len({example(*place) for place in where}) == len(where)


def test_iterating_a_dataset_is_one_epoch():
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32)
    examples = list(dataset)
    assert len(examples) == len(dataset) == 37
    assert equal(data.collate(examples, 0), dataset.batch(range(37)))


@given(documents(), st.integers(40, 50), seeds)
def test_a_batch_can_be_padded_to_a_fixed_length(docs, length, seed):
    dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), 40, seed)
    examples = [dataset[0], dataset[1]]
    usual, fixed = data.collate(examples, 0), data.collate(examples, 0, length=length)
    padding = {"input_ids": 0, "token_type_ids": 0, "mlm_labels": data.IGNORED_LABEL}
    for name, value in padding.items():
        assert fixed[name].shape == (2, length)
        width = usual[name].size(1)
        assert torch.equal(fixed[name][:, :width], usual[name])
        assert (fixed[name][:, width:] == value).all()


def digest(batches) -> str:
    arrays = [values.numpy() for batch in batches for values in batch.values()]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def test_a_seed_means_the_same_examples_in_every_version():
    """The same seed gives the same examples and orders in every version, so that results stay
    comparable. If numpy ever changes its generators, that is worth an entry in the changelog."""
    docs = [[[5 + (i * j) % 30 for i in range(3 + j)] for j in range(4 + d)] for d in range(6)]
    found = []
    for whole in (False, True):
        dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), 24, 7, whole)
        found.append(digest(dataset.batch([k, k + 100]) for k in range(2000)))
    orders = itertools.islice(data.EpochSampler(9, 4, 7), 9)
    found.append(digest({"indices": torch.tensor(indices)} for indices in orders))
    found.append(digest(review_batches([1 + i % 9 for i in range(400)], 3, 7)))
    assert found == ["3af044d36ab9f356", "4bbe73e86d78df58", "0950370136e5744f", "6590f10ad50e5c67"]


# ---- Epochs -------------------------------------------------------------------------------------


def test_an_epoch_has_an_example_for_each_pair_that_fits_but_one_at_least():
    corpus = corpus_of([[[5] * 10, [6] * 11]] * 5)
    examples = {40: 105 // 37, 55: 2, 56: 1, 200: 1}
    for length, count in examples.items():
        assert len(PretrainDataset(corpus, small_tokenizer(), length)) == count


@given(st.integers(1, 40), st.integers(1, 7), seeds, st.integers(1, 3), st.integers(0, 9))
def test_each_epoch_visits_every_example_once_for_any_ranks_and_start(
    size, batch, seed, world, start
):
    """The ranks' batches, taken in turn, are the batches of a single rank. A sampler that starts
    later yields the same batches as one that has run until then."""

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
    assert batches(steps - start, start=start) == batches(steps)[start:]


def test_orders_of_epochs_differ():
    flat = next(iter(data.EpochSampler(200, 400, seed=0)))
    first, second = flat[:200], [n - 200 for n in flat[200:]]
    assert first != second
    assert first != sorted(first)


# ---- Loaders ------------------------------------------------------------------------------------


def test_the_loader_yields_the_batches_of_its_rank_from_its_start_on():
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32, seed=3)
    loader = data.get_split_dataloader(dataset, 4, start=2, rank=1, world_size=3, workers=0)
    sampler = data.EpochSampler(len(dataset), 4, 3, start=2, rank=1, world_size=3)
    for batch, indices in zip(itertools.islice(loader, 5), sampler, strict=False):
        assert equal(batch, dataset.batch(indices))
    alone = data.get_split_dataloader(dataset, 4, workers=0)
    sampler = data.EpochSampler(len(dataset), 4, 3, start=0, rank=0, world_size=1)
    for batch, indices in zip(itertools.islice(alone, 3), sampler, strict=False):
        assert equal(batch, dataset.batch(indices))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32)

    def first(count, **options):
        loader = data.get_split_dataloader(dataset, 5, **options)
        return list(itertools.islice(loader, count))

    for one, other in zip(first(9, workers=0), first(9, workers=workers), strict=True):
        assert equal(one, other)
    assert equal(first(9, workers=0)[4], first(1, workers=workers, start=4)[0])


@pytest.mark.slow
def test_workers_that_are_spawned_make_the_same_batches(tmp_path):
    """macOS spawns workers: they receive the names of the files, not the tokens."""
    rows = [{"text": "\n\n".join(f"{a} {b} {a}" for b in LETTERS[:9])} for a in LETTERS]
    path = write_rows(tmp_path / "corpus.jsonl", rows)
    corpus = data.get_corpus(path, "train", small_tokenizer())
    dataset = data.PretrainDataset(corpus, small_tokenizer(), 16)
    alone, spawned = (data.get_split_dataloader(dataset, 4, workers=n) for n in (0, 2))
    spawned.multiprocessing_context = "spawn"
    for one, other in itertools.islice(zip(alone, spawned, strict=True), 5):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@st.composite
def sittings(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Draws a run in 3 to 5 sittings: the steps, ranks and workers of each."""
    sitting = st.tuples(
        st.integers(0, 4), st.sampled_from([1, 2, 4]), st.sampled_from([0, 0, 0, 1])
    )
    return draw(st.lists(sitting, min_size=3, max_size=5))


@given(sittings(), st.integers(4, 80), st.integers(1, 3), seeds)
def test_a_run_in_several_sittings_takes_the_batches_of_one(run, sentences, batch_size, seed):
    """Ranks and workers differ between the sittings, which end within an epoch or go on through
    several: an epoch has 2 to 49 examples. A step has four micro-batches.
    """
    corpus = corpus_of([[[7] * 9] * sentences] * 2)
    dataset = PretrainDataset(corpus, small_tokenizer(), 32, seed)
    accumulate = 4

    def micro_batches(step: int, steps: int, ranks: int, workers: int) -> list[dict]:
        """Returns those of the steps, in the order of one rank."""
        loaders = [
            iter(
                data.get_split_dataloader(
                    dataset, batch_size, step * accumulate // ranks, rank, ranks, workers
                )
            )
            for rank in range(ranks)
        ]
        turns = range(steps * accumulate // ranks)
        return [next(loader) for _ in turns for loader in loaders]

    found, step = [], 0
    for steps, ranks, workers in run:
        found += micro_batches(step, steps, ranks, workers)
        step += steps
    expected = micro_batches(0, step, ranks=1, workers=0)
    assert len(found) == len(expected) == step * accumulate
    for one, other in zip(found, expected, strict=True):
        assert equal(one, other)


@pytest.mark.slow
def test_a_worker_that_cannot_send_its_batch_is_an_error(monkeypatch):
    """Without a limit, the loader would wait without end."""
    monkeypatch.setattr(data, "WORKER_TIMEOUT", 1)
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32)
    loader = data.get_split_dataloader(dataset, 4, workers=1)
    loader.worker_init_fn = lambda worker: time.sleep(30)
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iter(loader))


def test_no_more_batches_wait_in_memory_than_documented():
    """Four batches wait for each worker; memory is pinned only where there is a GPU."""
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32)
    loader = data.get_split_dataloader(dataset, 4)
    assert (loader.num_workers, loader.prefetch_factor) == (2, 4)
    assert loader.pin_memory == torch.cuda.is_available()
    assert data.get_split_dataloader(dataset, 4, workers=0).prefetch_factor is None
