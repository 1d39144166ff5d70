"""`gemma runs DIRECTORY`: prints a table of the runs under a directory, and plots their loss curves."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gemma_jax.config import TrainingConfig, from_record, read_command
from gemma_jax.config.sections import setting
from gemma_jax.errors import UserError
from gemma_jax.paths import children, read_json, user_path
from gemma_jax.training.run_directory import CONFIG_FILE

if TYPE_CHECKING:
    from etils import epath

    from gemma_jax.training.sinks import Entry


@dataclasses.dataclass(frozen=True)
class RunsOptions:
    """List the runs under a directory, however deep."""

    plot: str = setting("", "A PNG file to draw their loss curves into.")


def run(arguments: Sequence[str], prog: str) -> int:
    """Print one line per run: step, losses, tokens and time."""
    (name,), options = read_command(arguments, prog, "DIRECTORY", RunsOptions())
    if options.plot and not options.plot.lower().endswith(".png"):
        raise UserError(f"plot is {options.plot}, but pictures are PNG; give it a name that ends in .png.")

    from gemma_jax.commands.tables import report_console, table
    from gemma_jax.training.metrics import duration, plot_losses

    folder = user_path(name)
    if not folder.is_dir():
        raise UserError(f"there is no directory {name}; name one that holds runs.")
    runs = {
        str(path.relative_to(folder)) if path != folder else folder.name: (config, entries)
        for path, config, entries in _find(folder, set())
    }
    if not runs:
        raise UserError(f"there are no runs under {name}; train one there with --run_dir.")
    titles = ["run", "step", "loss", "held-out", "bits/byte", "tokens", "time"]
    rows = table(titles, right=titles[1:])
    for label, (config, entries) in runs.items():
        # For each key, the newest entry that has it: training and held-out numbers are in separate entries.
        last = {key: (value, entry["step"]) for entry in entries for key, value in entry.items()}
        step = last["step"][0] if last else 0
        losses = [last.get(key) for key in ("loss", "held_out_loss", "held_out_bits_per_byte")]
        rows.add_row(
            label,
            f"{step:,}/{config.steps:,}",
            *(f"{x[0]:.3f}" + f" (step {x[1]:,})" * (x[1] < step) if x else "-" for x in losses),
            f"{last['tokens'][0]:,}" if "tokens" in last else "-",
            duration(last["seconds"][0]) if "seconds" in last else "-",
        )
    report_console().print(rows)
    if options.plot:
        curves = {label: entries for label, (_, entries) in runs.items() if entries}
        try:
            plot_losses(curves, user_path(options.plot))
        except OSError as error:
            raise UserError(f"{options.plot} cannot be written: {error.strerror}.") from error
        print(f"loss curves of {', '.join(curves) or 'no run'}: {options.plot}", file=sys.stderr)
    return 0


def _find(folder: "epath.Path", seen: set[str]) -> "Iterator[tuple[epath.Path, TrainingConfig, list[Entry]]]":
    """Yields the runs at and below a directory, sorted by name. It does not search inside a run.

    A run or directory that cannot be read is reported on standard error and skipped.
    """
    from gemma_jax.training.metrics import read_metrics

    place = os.path.realpath(folder)
    if place in seen:  # a symbolic link to a directory that was already visited
        return
    seen.add(place)
    path = folder / CONFIG_FILE
    if path.exists():
        try:
            record = read_json(path)
            # The config.json may be another program's, such as that of a published model.
            if isinstance(record, dict) and "experiment" in record:
                yield folder, from_record(record, str(path)), read_metrics(folder)
                return
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    try:
        inside = [child for child in children(folder) if child.is_dir()]
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)
        return
    for child in inside:
        yield from _find(child, seen)
