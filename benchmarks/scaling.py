"""Tokens a second and peak memory of a training step, along each size, beside what formulas say.

    python -m benchmarks.scaling        # writes results/scaling.jsonl and results/scaling.png

From mini with 16 x 128 tokens and the original vocabulary, one size is changed at a time. Each is
a process of its own.
"""

import json
import os
import statistics
from pathlib import Path


from benchmarks.bench import masked_tokens, our_step, row_lengths, useful_flops
from benchmarks.contest import contest

from bert import BertConfig

ROOT = Path(__file__).parents[1]
START = {"length": 128, "batch": 16, "layers": 4, "vocabulary": 30522}
AXES = {
    "length": (64, 128, 256, 512),
    "batch": (4, 8, 16, 32, 64),
    "layers": (1, 2, 4, 8, 12),
    "vocabulary": (2000, 8000, 30522, 60000),
}


def sizes_of(point: dict[str, int]) -> dict:
    sizes = {"size": "mini", "vocab_size": point["vocabulary"], "max_seq_length": 512}
    return {**sizes, "encoder_layers": point["layers"]}


def expected_bytes(point: dict[str, int]) -> float:
    """Without interpreter and libraries: weights, gradients and Adam's two moments, and what the
    backward pass needs of each layer, of the attention probabilities (before and after dropout, and
    its mask) and of the logits."""
    config = BertConfig.named(**sizes_of(point))
    width, tokens = config.d_model, point["batch"] * point["length"]
    layer = 4 * width**2 + 2 * width * config.d_feed_forward
    embeddings = (config.vocab_size + config.max_seq_length) * width
    parameters = point["layers"] * layer + embeddings + 2 * width**2 + config.vocab_size
    activations = point["layers"] * tokens * (11 * width + 2 * config.d_feed_forward)
    attention = point["layers"] * tokens * 3 * config.head_num * point["length"]
    logits = 3 * 0.15 * tokens * config.vocab_size
    return 4 * (4 * parameters + activations + attention + logits)


def expected_flops(point: dict[str, int]) -> float:
    shape = point["batch"], point["length"]
    config = BertConfig.named(**sizes_of(point))
    return useful_flops(config, row_lengths(*shape), masked_tokens(*shape))


def measure(point: dict[str, int]) -> dict[str, float]:
    found = contest({"ours": (our_step, sizes_of(point), point["batch"], point["length"])}, 4, 2)
    tokens = sum(row_lengths(point["batch"], point["length"]))
    return {
        "cores": os.cpu_count(),
        "tokens_per_second": tokens / found["ours"]["seconds"],
        "flops_per_second": expected_flops(point) / found["ours"]["seconds"],
        "MiB": found["ours"]["MiB"],
    }


def draw(lines: list[dict], file: Path) -> None:
    """Points as measured; dashed: one rate of operations and one size of the process for all."""
    from matplotlib.figure import Figure

    rate = statistics.median(line["flops_per_second"] for line in lines)
    process = statistics.median(line["MiB"] - expected_bytes(line) / 2**20 for line in lines)
    figure = Figure(figsize=(13, 6), layout="constrained")
    for column, (axis, values) in enumerate(AXES.items()):
        mine = [line for line in lines if line["axis"] == axis]
        points = [START | {axis: value} for value in values]
        real = [sum(row_lengths(p["batch"], p["length"])) for p in points]
        speed = [n * rate / expected_flops(p) for n, p in zip(real, points, strict=True)]
        memory = [process + expected_bytes(point) / 2**20 for point in points]
        for row, (name, expected) in enumerate(
            (("tokens_per_second", speed), ("MiB", memory)),
        ):
            axes = figure.add_subplot(2, len(AXES), 1 + column + row * len(AXES))
            measured = [line[name] for line in mine]
            axes.plot([line[axis] for line in mine], measured, "o-", label="measured")
            axes.plot(values, expected, "k--", label="formula")
            axes.set(xscale="log", xlabel=axis, ylim=(0, None))
            axes.set_xticks(values, [f"{v / 1000:.0f}k" if v > 999 else str(v) for v in values])
            axes.minorticks_off()
            if column == 0:
                axes.set_ylabel(("tokens/s", "peak memory, MiB")[row])
                axes.legend()
    figure.suptitle(
        f"A training step of mini on {lines[0]['cores']} cores; formula at "
        f"{rate / 1e9:.0f} GFLOP/s of useful work and {process:.0f} MiB of process"
    )
    figure.savefig(file, dpi=110)


def main() -> None:
    raw = ROOT / "results/scaling.jsonl"
    with raw.open("w") as file:
        for axis, values in AXES.items():
            for value in values:
                point = START | {axis: value}
                line = {"axis": axis, **point, **measure(point)}
                print(line, flush=True)
                file.write(json.dumps(line) + "\n")
    draw([json.loads(line) for line in raw.read_text().splitlines()], raw.with_suffix(".png"))


if __name__ == "__main__":
    main()
