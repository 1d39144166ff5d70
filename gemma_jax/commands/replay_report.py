"""Prints the result of `gemma replay`: a batch with its losses, as a report for people or as JSON."""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from gemma_jax.data.loader import Loader
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.metrics import RunLog
from gemma_jax.training.replay import Replay, mean_loss, replay_batch
from gemma_jax.training.run import Task

# Number of rows printed when a batch ends a run.
_ROWS_OF_A_FAILURE = 4


def show_failure(task: Task, log: RunLog, step: int, first_row: int, params: nnx.State) -> str:
    """Print the batch of a step that ends a run. A replay that fails must not hide why the run ends.

    Args:
      task, log: The task and the log of the run.
      step, first_row: The step of the batch, and the index of its first row in the data.
      params: The parameters before the step.

    Returns:
      The gradients that are not finite, as the end of a sentence.
    """
    try:
        shown = replay_batch(task.recipe, task.dataset, params, step, first_row, step - 1)
        print_report(shown, task.dataset.train, task.tokenizer, _ROWS_OF_A_FAILURE, log.console)
        return not_finite(shown, task.recipe.config.optimizer.loss_scale)
    except UserError as error:
        print(f"the batch of step {step} cannot be shown: {error}", file=sys.stderr)
        return ""


def print_report(replay: Replay, loader: Loader, tokenizer: Tokenizer, limit: int, console: Console) -> None:
    """Print a replay for a person.

    Args:
      replay: The result of recomputing the step.
      loader: The loader of the batch's rows.
      tokenizer: The tokenizer of the run.
      limit: The number of rows to print, highest loss first; 0 prints all.
      console: The console to print to.
    """
    rows, weights = replay.rows_by_loss(limit), replay.batch.loss_weights
    B = len(weights)
    finite = replay.token_losses[(weights > 0) & np.isfinite(replay.token_losses)]
    marked_from = float(np.quantile(finite, 0.95)) if len(finite) else np.inf

    def say(text: str | Text = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    say(
        f"step {replay.step}: rows {replay.first_row:,} to {replay.first_row + B - 1:,} of the data, "
        f"{int(np.sum(weights)):,} weighted tokens",
        "bold",
    )
    loss, norm = replay.loss, replay.gradient_norm
    say(f"loss {loss:.4f} nats a token, gradient norm {norm:.4f}, {parameters_used(replay)}")
    if replay.logged:
        norm = replay.logged.get("grad_norm", math.nan)
        say(f"the run logged loss {replay.logged['loss']:.4f}, gradient norm {norm:.4f}")
    say("\ngradient norms, of each layer where there are several:")
    for name, norms in replay.gradient_norms.items():
        say(f"  {name} {' '.join(f'{norm:.3g}' for norm in np.atleast_1d(norms))}")
    say(f"\n{len(rows)} of {B} rows, highest loss first. ⟨In brackets⟩: tokens without weight.")
    if len(finite):
        say(f"⟦Marked 1.2⟧: the twentieth of the tokens that lose most, {marked_from:.2f} nats or more.")
    else:
        say("No loss of this batch is finite: these parameters are spoilt, whatever the batch.", "bold red")
    for row in rows:
        where = f"row {replay.first_row + row:,} (number {row} of the batch)"
        say(f"\n{where}: loss {replay.row_loss(row):.3f}", "bold")
        for segment in _segments(replay, loader, row):
            number, origin, highest = segment.number, segment.origin, np.max(segment.losses)
            tokens = f"tokens {origin.start:,} to {origin.stop:,} of {origin.place} ({origin.source})"
            say(f"  segment {number}: loss {segment.loss:.3f}, highest {highest:.2f}; {tokens}", "cyan")
            if problem := segment.not_finite:
                say(f"  {problem} of {len(segment.losses)} losses are not finite", "bold red")
            for line in _marked_text(segment, tokenizer, marked_from).split("\n", allow_blank=True):
                say(Text("  │ ", "dim") + line)


def parameters_used(replay: Replay) -> str:
    """Returns a phrase that says which parameters a replay was computed with."""
    if replay.params_step == replay.step - 1:
        return f"with the very parameters that the step began with (step {replay.params_step})"
    return (
        f"with the parameters of step {replay.params_step}, the newest that are left from before the step "
        "(see checkpoint.keep_every)"
    )


def not_finite(replay: Replay, loss_scale: str = "off") -> str:
    """Returns the gradients that are not finite, by parameter and layer, as the end of a sentence.

    With float16 it names the layer whose activations are too large for it, if there is one.
    """
    if len(over := np.flatnonzero(~np.isfinite(replay.largest))):
        return f"; layer {over[0]} exceeds the range of float16: take compute.dtype float32 or bfloat16"
    found = []
    for name, norms in replay.gradient_norms.items():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(norms)))
        if len(bad):
            layers = f" (layers {', '.join(map(str, bad))})" if len(bad) < norms.size else ""
            found.append(f"{name}{layers}")
    if found:
        remedy = ""
        if len(replay.largest):  # in float16
            remedy = "; take compute.dtype float32 or bfloat16"
            if loss_scale == "off":
                remedy = ", which optimizer.loss_scale dynamic can prevent"
        return f"; not finite are the gradients of {', '.join(found)}{remedy}"
    if not np.isfinite(replay.loss):
        return ""
    return "; computed again from the same parameters, loss and gradients are finite: suspect the hardware"


def print_json(replay: Replay, loader: Loader, tokenizer: Tokenizer, limit: int) -> None:
    """Print a replay as JSON: one object for the step, then one for each row.

    A number that is not finite is printed as null, because JSON has no such numbers.
    """
    summary = {
        "step": replay.step,
        "parameters_of_step": replay.params_step,
        "first_row": replay.first_row,
        "loss": replay.loss,
        "grad_norm": replay.gradient_norm,
        "grad_norms": {name: norms.tolist() for name, norms in replay.gradient_norms.items()},
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


class _Segment(NamedTuple):
    number: int
    origin: Any
    token_ids: NDArray[np.int32]  # the targets
    losses: NDArray[np.float32]
    weights: NDArray[np.float32]

    @property
    def loss(self) -> float:
        return mean_loss(self.losses, self.weights)

    @property
    def not_finite(self) -> int:
        return int(np.sum(~np.isfinite(self.losses)))


def _segments(replay: Replay, loader: Loader, row: int) -> Iterator[_Segment]:
    arrays = replay.batch.targets[row], replay.token_losses[row], replay.batch.loss_weights[row]
    for number, origin in enumerate(loader.origin(replay.first_row + row), start=1):
        where = replay.batch.segment_ids[row] == number
        yield _Segment(number, origin, *(array[where] for array in arrays))


class _Span(NamedTuple):
    """The text of one token, or of several consecutive byte tokens decoded together."""

    text: str
    loss: float  # the highest of its tokens
    weight: float  # the highest of its tokens


def _spans(segment: _Segment, tokenizer: Tokenizer) -> Iterator[_Span]:
    for where, text in token_texts(segment.token_ids.tolist(), tokenizer):
        yield _Span(text, float(np.max(segment.losses[where])), float(np.max(segment.weights[where])))


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[list[int], str]]:
    """Yields the text of each token, or of several consecutive byte tokens together, with their indices."""
    values = [tokenizer.byte(token) for token in ids]
    for _, group in itertools.groupby(range(len(ids)), lambda i: i if values[i] is None else -1):
        where = list(group)
        joined = bytes(value for i in where if (value := values[i]) is not None)
        yield where, joined.decode(errors="replace") or tokenizer.piece(ids[where[0]]).replace("\u2581", " ")


def _marked_text(segment: _Segment, tokenizer: Tokenizer, marked_from: float) -> Text:
    # If most losses are not finite, those are not marked, because so many marks would hide the text.
    spoilt = segment.not_finite > len(segment.losses) / 2
    text, weighted = Text(), True
    for span in _spans(segment, tokenizer):
        if (span.weight > 0) != weighted:
            text.append("⟨" if weighted else "⟩")
            weighted = not weighted
        shown = printable(span.text)
        high = span.loss >= marked_from if np.isfinite(span.loss) else not spoilt
        if weighted and high:
            within = shown.replace("\n", "⏎")
            text.append(f"⟦{within} {span.loss:.1f}⟧", "black on yellow")
            text.append("\n" * shown.count("\n"))
        else:
            text.append(shown, "" if weighted else "dim")
    return text if weighted else text.append("⟩")


def printable(text: str) -> str:
    """Escapes characters that would control the terminal, because the data may contain anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
