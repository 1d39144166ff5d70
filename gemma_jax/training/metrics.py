"""What a run tells while it goes: JSON lines always, a progress bar in a terminal, plain lines elsewhere.

Only the first process of a job writes.
"""

import io
import json
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

METRICS_FILE = "metrics.jsonl"
Entry = dict[str, Any]


class Sink(Protocol):
    """A place that metrics go to besides the run's own file."""

    def write(self, entry: Entry) -> None:
        """Take the numbers of a step; `step` is among them."""

    def close(self) -> None:
        """Write out what is held back."""


def read_metrics(run_dir: epath.PathLike) -> list[Entry]:
    """The lines of a run's metrics file, oldest first; a line that a kill cut off is left out."""
    path = epath.Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def duration(seconds: float) -> str:
    """`42s`, `3m05s` or `2h07m`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class RunLog:
    """The log of one run."""

    def __init__(self, run_dir: epath.PathLike, steps: int, start: int, sinks: Iterable[Sink] = ()) -> None:
        """Args:
        run_dir: of the run; its metrics file is continued from step `start`.
        steps: of the whole run.
        start: steps done before; what the file says of later ones is dropped, for they will be done again.
        sinks: further places for the numbers.
        """
        self._first = jax.process_index() == 0
        self._path = epath.Path(run_dir) / METRICS_FILE
        self._steps, self._sinks = steps, list(sinks)
        self._console = Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._lines: list[str] = []
        self._written = time.monotonic()
        if not self._first:
            return
        kept = [entry for entry in read_metrics(run_dir) if entry["step"] <= start]
        self._path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._progress.add_task("compiling the step", total=steps, completed=start)
            self._progress.start()

    def message(self, text: str) -> None:
        """One line for the person who watches."""
        if self._first:
            (self._progress.console if self._progress else self._console).print(
                text, markup=False, highlight=False, soft_wrap=True
            )

    def training(self, entry: Entry, seconds_left: float, announce: bool) -> None:
        """The numbers of a step; `announce` makes a plain line where there is no terminal."""
        shown = (
            f"loss {entry['loss']:.3f}  lr {entry['learning_rate']:.2e}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s  {duration(seconds_left)} left"
        )
        if self._progress:
            self._progress.update(self._task, completed=entry["step"], description=shown)
        elif announce:
            self.message(f"step {entry['step']}/{self._steps}  {shown}")
        if announce:
            self._write(entry)

    def held_out(self, entry: Entry) -> None:
        """The numbers of an evaluation."""
        self.message(
            f"step {entry['step']}/{self._steps}  held-out loss {entry['held_out_loss']:.3f} nats a token, "
            f"{entry['held_out_bits_per_byte']:.3f} bits a byte"
        )
        self._write(entry)

    def _write(self, entry: Entry) -> None:
        if not self._first:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for sink in self._sinks:
            sink.write(entry)

    def close(self) -> None:
        """End the progress bar and the sinks."""
        if self._progress:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()


def plot_losses(runs: dict[str, list[Entry]], path: epath.PathLike) -> None:
    """Draw the loss curves of runs, by name, into one PNG: training as lines, held-out as points."""
    # Late: matplotlib costs a second, and the figure needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, entries) in enumerate(runs.items()):
        color = f"C{index % 10}"
        training = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        held_out = [(e["step"], e["held_out_loss"]) for e in entries if "held_out_loss" in e]
        if training:
            axes.plot(
                *zip(*training, strict=True), color=color, linewidth=1.2, alpha=0.8, label=f"{name}: training"
            )
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True),
                color=color,
                linestyle="--",
                marker="o",
                markersize=4,
                label=f"{name}: held out",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy, nats a token")
    axes.grid(alpha=0.3)
    if runs:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    epath.Path(path).write_bytes(picture.getvalue())
