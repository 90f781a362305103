"""The benchmark measures what it says it does. How fast anything is, is not tested here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import PADDING
from torch.utils.flop_counter import FlopCounterMode

import data
from benchmarks import bench
from benchmarks.contest import contest
from bert import BertConfig, BertPretrainModel
from train_pretrain import sum_losses, to_device


@pytest.mark.parametrize(("rows", "length"), [(2, 16), (3, 40)])
def test_useful_flops_are_what_torch_counts_in_a_step_of_full_rows(rows, length):
    """The explicit attention is counted, since the fused one is not counted on a CPU."""
    config = BertConfig.named("mini", vocab_size=500, fused_attention=False)
    batch = to_device(bench.random_batch(rows, length, 500), torch.device("cpu"))
    assert bench.row_lengths(rows, length) == [length] * rows
    with FlopCounterMode(display=False) as counter:
        sum(sum_losses(BertPretrainModel(config, PADDING), batch)).backward()
    assert counter.get_total_flops() == pytest.approx(
        bench.useful_flops(config, [length] * rows, rows * round(0.15 * length)), rel=1e-9
    )


def test_a_random_batch_has_the_masks_of_a_real_one():
    batch = bench.random_batch(4, 128)
    is_masked = batch["mlm_labels"] != data.IGNORED_LABEL
    assert is_masked.sum(dim=1).tolist() == [19, 19, 19, 15]
    assert is_masked.sum() == bench.masked_tokens(4, 128)
    assert (batch["input_ids"][is_masked] == 4).all()
    lengths = (batch["input_ids"] != PADDING).sum(dim=1).tolist()
    assert lengths == bench.row_lengths(4, 128) == [128, 128, 128, 103]


def counted(path: Path, factor: int):
    """Returns work that takes `factor` times as long, and leaves a note of its turn."""

    def work() -> None:
        with path.open("a") as file:
            file.write(f"{factor} ")
        np.linalg.svd(np.random.default_rng(0).random((150 * factor, 150)))

    return work


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_contestants_take_turns_in_processes_of_their_own(tmp_path):
    notes = tmp_path / "notes"
    found = contest({"quick": (counted, notes, 1), "slow": (counted, notes, 20)}, 3, warm_up=1)
    assert notes.read_text().split() == ["1", "20"] * 4
    assert found["quick"]["faster"] == 1.0
    assert found["slow"]["faster"] > 1.5
    assert found["slow"]["seconds"] > found["quick"]["seconds"]


@pytest.mark.slow
def test_a_step_is_the_same_work_for_both_contestants():
    """Both have the same number of parameters, and a step changes every one of them."""
    sizes = {"size": "tiny", "vocab_size": 300, "dropout": 0.0}
    config = BertConfig.named(**sizes)
    ours, theirs = BertPretrainModel(config, 0), bench.their_model(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for make in (bench.our_step, bench.their_step):
        step = make(sizes, 4, 16)
        before = [parameter.detach().clone() for parameter in step.model.parameters()]
        step()
        for one, other in zip(before, step.model.parameters(), strict=True):
            assert not torch.equal(one, other)
    found = bench.gpu_steps("tiny", 2, 16, "cpu", steps=1, rounds=1, compiled=(False,))
    assert len(found) == 2
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
def test_the_parts_that_measure_data_run_on_the_sample():
    texts = list(data.get_dataset("sample")["text"][:30])
    tokenizer = data.train_tokenizer(texts, 300)
    corpus = data.get_corpus("sample", "train", tokenizer)
    found = bench.batches(corpus, texts, tokenizer) | bench.tokenizing(texts, tokenizer)
    found |= bench.waiting(corpus, tokenizer, {"size": "tiny"}, 2, 32, "cpu", steps=3)
    assert 0 < found["batches, padding"] < 0.5
    assert 0 <= found["tiny, 2 x 32: waiting for data, share of a step"] < 1
    assert all(value > 0 for name, value in found.items() if "/s" in name)


def test_a_part_of_the_benchmark_that_does_not_exist_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--only", "mini", "steps"])
    monkeypatch.setattr(bench, "training_steps", lambda *_: pytest.fail("a part was run"))
    with pytest.raises(SystemExit):
        bench.main()
    assert "--only steps: the parts are tokenizing batches" in capsys.readouterr().err
