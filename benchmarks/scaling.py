"""Trains three model sizes on the same tokens, to check that larger models reach a lower loss (scaling laws).

Each size is trained by `train.py pretrain demo` with another shape, on the Python sources of this
installation in the same order. The held-out loss of each evaluation is plotted against the floating-point
operations used until then. The exit status is 1 unless every larger model ends with a lower loss than every
smaller one. A run that was stopped is resumed; a complete run is only read.

    python benchmarks/scaling.py [--steps 400] [--runs runs/scaling] [--plot docs/scaling.png]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]

# Maps each width to its learning rate: the demo's 4e-3 at width 192, scaled inversely to the width, as in
# Tensor Programs V (Yang et al., 2022) for Adam and the hidden weights.
SIZES = {64: 1.2e-2, 128: 6e-3, 256: 3e-3}
HEAD_DIM = 64


def shape(width: int) -> dict[str, int]:
    """Returns the fields that give the demo's model another width; the feed-forward is 4 times as wide.

    The model still has 4 layers and one key/value head.
    """
    return {"embed_dim": width, "hidden_dim": 4 * width, "num_heads": width // HEAD_DIM}


def train(width: int, learning_rate: float, steps: int, run: Path) -> None:
    """Trains one size by the command that a user would run."""
    options = {
        "run_dir": run,
        "steps": steps,
        "optimizer.learning_rate": learning_rate,
        # Evaluates often, because the curves are steep, and on 256 rows, because all held-out rows would
        # take too long.
        "evaluation.every": max(steps // 20, 1),
        "evaluation.rows": 256,
        "checkpoint.every": max(steps // 4, 1),
        "logging.every": max(steps // 20, 1),
    } | {f"model.{name}": value for name, value in shape(width).items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "train.py", "pretrain", "demo", *words], cwd=REPOSITORY, check=True)


def curve(run: Path) -> tuple[dict[str, float], list[tuple[float, float, float]]]:
    """Returns facts about a run, and (FLOPs, nats per token, bits per byte) of each evaluation."""
    from gemma_jax.config import from_json
    from gemma_jax.training.hardware import training_flops_a_token
    from gemma_jax.training.metrics import read_metrics

    config = from_json((run / "config.json").read_text(), str(run))
    model, data = config.model, config.data
    flops_a_token = training_flops_a_token(model, data.sequence_length)
    attention = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    about = {
        "width": model.embed_dim,
        "parameters_without_embedding": model.num_layers
        * (attention + 3 * model.embed_dim * model.hidden_dim),
        "learning_rate": config.optimizer.learning_rate,
        "tokens": config.steps * data.batch_size * data.sequence_length,
    }
    points = [
        (
            entry["step"] * data.batch_size * data.sequence_length * flops_a_token,
            entry["held_out_loss"],
            entry["held_out_bits_per_byte"],
        )
        for entry in read_metrics(run)
        if "held_out_loss" in entry
    ]
    return about, points


def draw(curves: list[tuple[dict[str, float], list[tuple[float, float, float]]]], path: Path) -> None:
    """Plots held-out loss against compute, both on logarithmic scales."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for about, points in curves:
        label = f"{about['parameters_without_embedding'] / 1e6:.2f}M parameters"
        flops, loss, _ = zip(*points, strict=True)
        [line] = axes.loglog(flops, loss, marker="o", markersize=3, linewidth=1.5, label=label)
        axes.annotate(
            f"{loss[-1]:.2f}",
            (flops[-1], loss[-1]),
            textcoords="offset points",
            xytext=(6, -3),
            color=line.get_color(),
            fontsize="small",
        )
    axes.set_xlabel("training compute, FLOPs")
    axes.set_ylabel("held-out loss, nats a token")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    losses = [loss for _, points in curves for _, loss, _ in points]
    axes.set_yticks(np.arange(np.floor(2 * min(losses)), np.ceil(2 * max(losses)) + 1) / 2)
    axes.set_ylim(min(losses) * 0.97, max(losses) * 1.03)
    axes.margins(x=0.1)
    axes.set_title(f"{curves[0][0]['tokens'] / 1e6:.2f}M tokens of Python source each")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="without embedding", frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of 8 rows of 256 tokens, for each size")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "scaling")
    parser.add_argument("--plot", type=Path, default=REPOSITORY / "docs" / "scaling.png")
    arguments = parser.parse_args()
    curves = []
    for width, learning_rate in SIZES.items():
        run = arguments.runs.absolute() / f"width-{width}"
        train(width, learning_rate, arguments.steps, run)
        curves.append(curve(run))
        about, points = curves[-1]
        flops, loss, bits = points[-1]
        print(json.dumps({**about, "flops": flops, "held_out_loss": loss, "bits_per_byte": bits}), flush=True)
    draw(curves, arguments.plot)
    ends = [points[-1][1] for _, points in curves]
    if ends != sorted(ends, reverse=True):
        sys.exit("a larger model did not end better than a smaller one")


if __name__ == "__main__":
    main()
