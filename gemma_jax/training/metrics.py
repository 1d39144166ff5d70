"""Reports the metrics of a run while it trains, and draws loss curves.

A run always writes JSON lines; it also shows a progress bar in a terminal, or prints plain lines elsewhere.
Only the first process of a job writes.
"""

import io
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from gemma_jax.errors import UserError
from gemma_jax.paths import LARGE_FILE, in_bucket, read_text
from gemma_jax.training.goodput import seconds_before
from gemma_jax.training.hardware import quantity
from gemma_jax.training.sinks import Entry, Sink

METRICS_FILE = "metrics.jsonl"

# An object in a bucket cannot be appended to. The whole file is rewritten, so at most once in this time.
_BUCKET_SECONDS = 60

# In a terminal with fewer columns than this, the progress bar leaves out FLOP/s or MFU.
_WIDE = 100


def read_metrics(run_dir: epath.PathLike) -> list[Entry]:
    """Returns the entries of a run's metrics file, oldest first; damaged lines are left out.

    Raises:
      UserError: The file cannot be read.
    """
    path = epath.Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = read_text(path, LARGE_FILE, errors="replace").splitlines()
    entries = [entry for line in lines if (entry := _entry(line)) is not None]
    # A killed process may leave an incomplete last line, which is not reported. Any other damage is.
    if len(entries) < len(lines) - (not lines or _entry(lines[-1]) is None):
        say(f"{path}: {len(lines) - len(entries)} damaged lines are left out")
    return entries


def _entry(line: str) -> Entry | None:
    """Returns the numbers in a line of the log, or None if the line is not a valid entry."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    return (
        entry if all(type(x) is float or type(x) is int and abs(x) < 2**63 for x in entry.values()) else None
    )


def duration(seconds: float) -> str:
    """Formats seconds as `42s`, `3m05s` or `2h07m`, or as `-` if the number is not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def say(text: str) -> None:
    """Print a line to standard error, in the first process of a job only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class RunLog:
    """The log of one run."""

    def __init__(self, run_dir: epath.PathLike, steps: int, start: int, sinks: Iterable[Sink] = ()) -> None:
        """Args:
        run_dir: The directory of the run. Its metrics file is continued from step `start`.
        steps: The number of steps of the whole run.
        start: The step to resume from. Entries of later steps are dropped, because these steps are repeated.
        sinks: Further destinations for the numbers.
        """
        self._first = jax.process_index() == 0
        self._path = epath.Path(run_dir) / METRICS_FILE
        self._steps, self._sinks = steps, list(sinks)
        self.console = Console(file=sys.stderr, quiet=not self._first, highlight=False)
        """The console on standard error; quiet in all processes but the first."""
        self._progress: Progress | None = None
        self.spent_before: dict[str, float] = {}
        """Seconds by kind of earlier processes of the run, for `Goodput`; only in the job's first process."""
        self._seconds_before = 0.0
        self._started = time.monotonic()
        if not self._first:
            return
        entries = read_metrics(run_dir)
        self.spent_before = seconds_before(entries, start)
        kept = [entry for entry in entries if entry["step"] <= start]
        if kept:
            self._seconds_before = kept[-1].get("seconds", 0.0)
        self._lines = [json.dumps(entry) + "\n" for entry in kept]
        # Write a new file and rename it, so that a kill cannot lose the entries that are kept.
        unfinished = epath.Path(run_dir) / f"{METRICS_FILE}.tmp"
        unfinished.write_text("".join(self._lines))
        unfinished.replace(self._path)
        self._written = time.monotonic()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                console=self.console,
                expand=True,
            )
            self._task = self._progress.add_task("compiling the step", total=steps, completed=start)
            self._progress.start()

    def message(self, text: str) -> None:
        """Print one line to the console."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Print texts of a step, by title, and pass them on."""
        for title, text in texts.items():
            self.message(f"step {step}  {title} -> {text}")
        for sink in self._sinks if texts else ():
            sink.write_texts(step, texts)

    def training(self, entry: Entry, seconds_left: float) -> None:
        """Report the numbers of a training step.

        An entry with `peak_memory_bytes` is also written to the log, and printed where there is no terminal.

        Args:
          entry: `step`, `loss`, `learning_rate`, `tokens_per_second`, `flops_per_second`, `input_wait_share`;
            optionally `flops_utilisation`; and optionally `peak_memory_bytes` and `goodput` together.
          seconds_left: The estimated time to the end of the run.
        """
        announce = "peak_memory_bytes" in entry
        shown = [f"loss {entry['loss']:.3f}", f"lr {entry['learning_rate']:.2e}"]
        if entry["tokens_per_second"]:  # known from the second step on
            shown.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
            if not self._progress or self.console.width >= _WIDE:
                utilisation = entry.get("flops_utilisation")
                achieved = quantity(entry["flops_per_second"], "FLOP/s")
                shown.append(achieved if utilisation is None else f"{utilisation:.1%} MFU")
            shown.append(f"{duration(seconds_left)} left")
        if entry["input_wait_share"] >= 0.05:
            shown.append(f"waits {entry['input_wait_share']:.0%} for data")
        if self._progress:
            self._progress.update(self._task, completed=entry["step"], description="  ".join(shown))
        elif announce:
            shown += [f"{entry['goodput']:.0%} productive", quantity(entry["peak_memory_bytes"], "B")]
            self.message(f"step {entry['step']}/{self._steps}  {'  '.join(shown)}")
        if announce:
            self.event(entry)

    def evaluation(self, entry: Entry) -> None:
        """Report the numbers of an evaluation: `step`, and any others by name."""
        numbers = {name: value for name, value in entry.items() if name != "step"}
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in numbers.items())
        self.message(f"step {entry['step']}/{self._steps}  {shown}")
        self.event(entry)

    def event(self, entry: Entry) -> None:
        """Write an entry to the log: the numbers of a step, or an event such as a start or a skipped step."""
        if not self._first:
            return
        # The time of all processes whose steps were kept, without the pauses between the processes.
        seconds = self._seconds_before + time.monotonic() - self._started
        entry = {**entry, "seconds": round(seconds, 3), "time": time.time()}
        line = json.dumps(entry) + "\n"
        try:
            if not in_bucket(self._path):
                with self._path.open("a") as file:
                    file.write(line)
            else:
                self._lines.append(line)
                if time.monotonic() - self._written >= _BUCKET_SECONDS:
                    self._write_bucket()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path} ({error}); free some space; the same command then resumes."
            ) from error
        for sink in self._sinks:
            sink.write(entry)

    def _write_bucket(self) -> None:
        self._path.write_text("".join(self._lines))
        self._written = time.monotonic()

    def close(self) -> None:
        """Close the progress bar and the sinks, and write what a bucket still lacks."""
        if self._first and in_bucket(self._path):
            self._write_bucket()
        if self._progress:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()


def plot_losses(runs: Mapping[str, Sequence[Entry]], path: epath.PathLike) -> None:
    """Draw the loss curves of runs, by name, into one PNG: training as lines, held-out as points."""
    # Imported here because importing matplotlib takes a second. A bare Figure needs no display.
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(runs)))
    shown: list[NDArray[np.float64]] = []
    for (name, entries), color in zip(runs.items(), colors, strict=True):
        training = _curve(entries, "loss")
        held_out = _curve(entries, "held_out_loss")
        axes.plot(training[:, 0], _smoothed(training[:, 1]), color=color, label=_label(name))
        axes.plot(*held_out.T, color=color, linestyle="--", linewidth=1, marker="o", markersize=4)
        shown += [_after_the_drop(curve) for curve in (training, held_out)]
    values = np.concatenate([*shown, []])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = values.min(), values.max()
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy, nats a token")
    axes.set_title("training loss (lines) and held-out loss (points)")
    axes.grid(alpha=0.3)
    legend = figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name does not begin TeX math
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    epath.Path(path).write_bytes(picture.getvalue())


def _label(name: str) -> str:
    """Returns a name that matplotlib can show: valid UTF-8, and no leading underscore, which hides it."""
    shown = name.encode(errors="replace").decode()
    return f" {shown}" if shown.startswith("_") else shown


def _curve(entries: Sequence[Entry], name: str) -> NDArray[np.float64]:
    """Returns the step and value of each entry that has the name, [points, 2]."""
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return np.array(points, np.float64).reshape(-1, 2)


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns a moving average over a fiftieth of the curve, because the loss of a batch is noisy."""
    half = len(values) // 100
    sums = np.cumsum([0.0, *values])
    stops = np.minimum(np.arange(len(values)) + half + 1, len(values))
    starts = np.maximum(np.arange(len(values)) - half, 0)
    return (sums[stops] - sums[starts]) / (stops - starts)


def _after_the_drop(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the values that set the range of the y-axis.

    The first twentieth of the steps (the initial drop) and the highest 1% of the values are left out.
    """
    if not len(curve):
        return curve[:, 1]
    late = curve[curve[:, 0] >= 0.05 * curve[-1, 0], 1]
    return late[late <= np.nanquantile(late, 0.99)]
