"""What `gemma replay` prints: a batch with its losses, for a person or for a program."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma_jax.data.loader import Loader
from gemma_jax.data.packing import Batch
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.replay import BatchMeasures


class Replay(NamedTuple):
    """A step that was looked at again."""

    step: int
    params_step: int  # steps that the parameters had been trained for
    first_row: int  # number of the batch's first row in the stream of training rows
    batch: Batch  # all its rows
    measures: BatchMeasures
    logged: dict[str, Any] | None  # what the run itself wrote of this step

    def row_loss(self, row: int) -> float:
        """Mean loss of a row's weighted targets, nats; 0 where there are none."""
        return _mean(self.measures.token_losses[row], self.batch.loss_weights[row])

    def rows_by_loss(self, limit: int) -> list[int]:
        """Numbers within the batch: losses that are not finite, then the highest ones; 0 gives all."""
        losses = [self.row_loss(row) for row in range(len(self.batch.tokens))]
        order = sorted(
            range(len(losses)), key=lambda row: -losses[row] if np.isfinite(losses[row]) else -np.inf
        )
        return order[: limit or None]

    @property
    def gradient_norm(self) -> float:
        """Of all parameters together."""
        squares = [np.sum(np.square(x, dtype=np.float64)) for x in self.measures.gradient_norms.values()]
        return float(np.sqrt(sum(squares)))


def print_report(replay: Replay, loader: Loader, tokenizer: Tokenizer, limit: int, console: Console) -> None:
    """Print a replay for a person.

    Args:
      replay: the step.
      loader: that its rows come from.
      tokenizer: of the run.
      limit: how many rows, of highest loss first; 0 prints all.
      console: where.
    """
    rows = replay.rows_by_loss(limit)
    B = len(replay.batch.tokens)
    counted = replay.measures.token_losses[replay.batch.loss_weights > 0]
    marked_from = _quantile(counted, 0.95)

    def say(text: str | Text = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    say(
        f"step {replay.step}: rows {replay.first_row:,} to {replay.first_row + B - 1:,} of the data, "
        f"{int(np.sum(replay.batch.loss_weights)):,} weighted tokens",
        "bold",
    )
    say(
        f"loss {replay.measures.loss:.4f} nats a token, gradient norm {replay.gradient_norm:.4f}, "
        f"{parameters_used(replay)}"
    )
    if replay.logged:
        say(
            f"the run logged loss {replay.logged['loss']:.4f}, gradient norm {replay.logged['grad_norm']:.4f}"
        )
    say()
    _print_gradients(replay, console)
    say()
    marked, unweighted = ("Marked", "dim") if console.is_terminal else ("⟦Marked 1.2⟧", "⟨in brackets⟩")
    say(f"{len(rows)} of {B} rows, highest loss first. {unweighted.capitalize()}: tokens without weight.")
    if np.isfinite(marked_from):
        say(f"{marked}: the twentieth of the batch's tokens that lose most, {marked_from:.2f} nats or more.")
    else:
        say("No loss of this batch is finite: these parameters are spoilt, whatever the batch.", "bold red")
    for row in rows:
        say()
        say(
            f"row {replay.first_row + row:,} (number {row} of the batch): loss {replay.row_loss(row):.3f}",
            "bold",
        )
        for segment in _segments(replay, loader, row):
            say(
                f"  segment {segment.number}: loss {segment.loss:.3f}, highest {np.max(segment.losses):.2f}; "
                f"tokens {segment.origin.start:,} to {segment.origin.stop:,} of {segment.origin.place} "
                f"({segment.origin.source})",
                "cyan",
            )
            if problem := segment.not_finite:
                say(f"  {problem} of {len(segment.losses)} losses are not finite", "bold red")
            text = _marked_text(segment, tokenizer, marked_from, console.is_terminal)
            for line in text.split("\n", allow_blank=True):
                say(Text("  │ ", "dim") + line)


def parameters_used(replay: Replay) -> str:
    """Which parameters a replay was computed with, as half a sentence."""
    if replay.params_step == replay.step - 1:
        return f"with the very parameters that the step began with (step {replay.params_step})"
    if replay.params_step == 0:
        return (
            "with the run's first, random parameters (step 0): no checkpoint from before the step is left, "
            "see checkpoint.keep_every"
        )
    return f"with the parameters of step {replay.params_step}, the newest checkpoint from before the step"


def not_finite(replay: Replay) -> str:
    """Which gradients of a batch are not finite, by parameter and layer, as the rest of a sentence."""
    found = []
    for name, norms in replay.measures.gradient_norms.items():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(norms))).tolist()
        if bad:
            layers = f"{bad[0]} to {bad[-1]}" if len(bad) == bad[-1] - bad[0] + 1 > 1 else _listed(bad)
            found.append(f"{name} of layer{'s' * (len(bad) > 1)} {layers}" if norms.ndim else name)
    if found:
        return f"; not finite are the gradients of {_listed(found)}"
    if not np.isfinite(replay.measures.loss):
        return ""
    return "; computed again from the same parameters, loss and gradients are finite: suspect the hardware"


def _listed(items: Sequence[Any]) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last


def print_json(replay: Replay, loader: Loader, tokenizer: Tokenizer, limit: int) -> None:
    """Print a replay for a program: an object for the step, then one for each row.

    A number that is not finite is null: JSON has none.
    """
    summary = {
        "step": replay.step,
        "parameters_of_step": replay.params_step,
        "first_row": replay.first_row,
        "loss": replay.measures.loss,
        "grad_norm": replay.gradient_norm,
        "grad_norms": {name: norms.tolist() for name, norms in replay.measures.gradient_norms.items()},
        "logged": replay.logged,
    }
    print(json.dumps(_finite(summary)))
    for row in replay.rows_by_loss(limit):
        segments = [
            {
                "segment": segment.number,
                "loss": segment.loss,
                **dataclasses.asdict(segment.origin),
                "text": "".join(span.text for span in _spans(segment, tokenizer)),
                "token_ids": segment.token_ids.tolist(),
                "token_losses": segment.losses.tolist(),
                "loss_weights": segment.weights.tolist(),
            }
            for segment in _segments(replay, loader, row)
        ]
        about = {"row": replay.first_row + row, "loss": replay.row_loss(row), "segments": segments}
        print(json.dumps(_finite(about)))


@dataclasses.dataclass(frozen=True)
class _Segment:
    number: int
    origin: Any
    token_ids: NDArray[np.int32]  # what was to be predicted
    losses: NDArray[np.float32]
    weights: NDArray[np.float32]

    @property
    def loss(self) -> float:
        return _mean(self.losses, self.weights)

    @property
    def not_finite(self) -> int:
        return int(np.sum(~np.isfinite(self.losses)))


def _segments(replay: Replay, loader: Loader, row: int) -> Iterator[_Segment]:
    batch = replay.batch
    for number, origin in enumerate(loader.origin(replay.first_row + row), start=1):
        where = batch.segment_ids[row] == number
        yield _Segment(
            number,
            origin,
            batch.targets[row][where],
            replay.measures.token_losses[row][where],
            batch.loss_weights[row][where],
        )


class _Span(NamedTuple):
    """A token as text, or several that are bytes of one piece of text."""

    text: str
    loss: float  # the highest
    weight: float


def _spans(segment: _Segment, tokenizer: Tokenizer) -> Iterator[_Span]:
    pieces = [tokenizer.piece(token) for token in segment.token_ids.tolist()]
    start = 0
    while start < len(pieces):
        stop = start + 1
        text = pieces[start].replace("\u2581", " ")
        if _BYTE.fullmatch(pieces[start]):
            while stop < len(pieces) and _BYTE.fullmatch(pieces[stop]):
                stop += 1
            text = bytes(int(piece[3:5], 16) for piece in pieces[start:stop]).decode(errors="replace")
        yield _Span(
            text, float(np.max(segment.losses[start:stop])), float(np.max(segment.weights[start:stop]))
        )
        start = stop


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _marked_text(segment: _Segment, tokenizer: Tokenizer, marked_from: float, terminal: bool) -> Text:
    # Where most losses are not finite, marks on all of them would hide the text.
    spoilt = segment.not_finite > len(segment.losses) / 2
    text = Text()
    weighted = True
    for span in _spans(segment, tokenizer):
        if not terminal and (span.weight > 0) != weighted:
            text.append("⟨" if weighted else "⟩")
            weighted = not weighted
        high = span.weight > 0 and (span.loss >= marked_from or not np.isfinite(span.loss))
        if not high or (spoilt and not np.isfinite(span.loss)):
            text.append(_printable(span.text), None if span.weight > 0 or not terminal else "dim")
        elif terminal:
            text.append(_printable(span.text, newline="⏎\n"), "black on yellow")
        else:
            text.append(
                f"⟦{_printable(span.text, newline='⏎')} {span.loss:.1f}⟧" + "\n" * span.text.count("\n")
            )
    if not weighted:
        text.append("⟩")
    return text


def _printable(text: str, newline: str = "\n") -> str:
    """Without what would control the terminal: the data may hold anything."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    return shown.replace("\n", newline)


def _print_gradients(replay: Replay, console: Console) -> None:
    norms = replay.measures.gradient_norms
    stacked = {name: norm for name, norm in norms.items() if norm.ndim}
    whole = [f"{name} {float(norm):.3g}" for name, norm in norms.items() if not norm.ndim]
    console.print(f"gradient norms: {'; '.join(whole)}; by layer:", markup=False, soft_wrap=True)
    # As many layers beside each other as there is room for.
    room = max((console.width - max(map(len, stacked), default=0)) // 10, 1)
    for start in range(0, max(map(len, stacked.values()), default=0), room):
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer")
        for layer in range(start, min(start + room, max(map(len, stacked.values())))):
            table.add_column(str(layer), justify="right")
        for name, norm in stacked.items():
            table.add_row(name, *(f"{value:.3g}" for value in norm[start : start + room]))
        console.print(table)


def _mean(losses: NDArray[np.float32], weights: NDArray[np.float32]) -> float:
    total = float(np.sum(weights))
    # A loss that is not finite must not spoil the mean where it has no weight.
    return float(np.sum(losses[weights > 0] * weights[weights > 0])) / total if total else 0.0


def _quantile(values: NDArray[np.float32], share: float) -> float:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, share)) if len(finite) else np.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
