"""Three sizes on one corpus and one budget of tokens: does a larger model end better, as scaling laws say?

Each size is trained by `train.py pretrain demo` with another shape, all on the Python sources of this
installation and in the same order. The held-out loss of each evaluation is drawn against the floating-point
operations spent until then. Ends with status 1 unless every larger model ends below every smaller one.
A run that was stopped is resumed; one that is complete is only read.

    python benchmarks/scaling.py [--steps 400] [--runs runs/scaling] [--plot docs/scaling.png]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]

# Width, and the learning rate of its run: the demo's 4e-3 at width 192, in inverse proportion to the width,
# as Tensor Programs V (Yang et al., 2022) has it for Adam and the weights between layers.
SIZES = {64: 1.2e-2, 128: 6e-3, 256: 3e-3}
HEAD_DIM = 64


def shape(width: int) -> dict[str, int]:
    """The demo's model at another width: 4 layers, feed-forward 4 times as wide, one key/value head."""
    return {"embed_dim": width, "hidden_dim": 4 * width, "num_heads": width // HEAD_DIM}


def train(width: int, learning_rate: float, steps: int, run: Path) -> None:
    """Train one size, as a user would."""
    options = {
        "run_dir": run,
        "steps": steps,
        "optimizer.learning_rate": learning_rate,
        # Often where the curves are steep, and every held-out row of the corpus would be too many.
        "evaluation.every": max(steps // 20, 1),
        "evaluation.rows": 256,
        "checkpoint.every": max(steps // 4, 1),
        "logging.every": max(steps // 20, 1),
    } | {f"model.{name}": value for name, value in shape(width).items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "train.py", "pretrain", "demo", *words], cwd=REPOSITORY, check=True)


def curve(run: Path) -> tuple[dict[str, float], list[tuple[float, float, float]]]:
    """What a run is, and (FLOPs, nats a token, bits a byte) of each evaluation."""
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
    """Held-out loss against compute, both on logarithmic scales."""
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
