"""The phases of pretraining on film reviews: first single tokens, then context.

python -m experiments.phases    # draws phases.png from the afternoon's lines
"""

from typing import Any

from experiments.curves import HERE, new_figure, plot_pretraining

TICKS = (0, 50, 100, 300, 1000, 3000, 10000)


def draw() -> Any:
    """Draws the loss and the accuracies by step, on a scale that shows the first hundred."""
    figure = new_figure((11, 4.2))
    loss, shares = figure.subplots(1, 2)
    plot_pretraining(loss, shares, HERE / "afternoon/pretrain")
    for panel in (loss, shares):
        panel.set_xscale("symlog", linthresh=100)
        panel.set_xlim(left=0)
        panel.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
    loss.legend(fontsize=8)
    shares.legend(fontsize=8, loc="upper left")  # where no curve runs
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "phases.png", dpi=110)
