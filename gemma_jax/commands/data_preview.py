"""`gemma data-preview CONFIG`: prints the first examples that a config fine-tunes on, and what is trained."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_jax.config import FinetuneConfig, load, read_command, validate_bounds
from gemma_jax.config.sections import setting
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from gemma_jax.data.source import Example
    from gemma_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PreviewOptions(FinetuneConfig):
    """Show the first examples of a config. The other options are those of the config."""

    examples: int = setting(5, "Examples (or pairs) to show of each source.", 1)


def run(arguments: Sequence[str], prog: str) -> int:
    """Print the first examples of each source, and how many of their tokens are trained."""
    _, config = read_command(arguments, prog, "CONFIG", PreviewOptions(), load=_load, validate=_validate)

    from gemma_jax.commands.tables import report_console
    from gemma_jax.data.examples import open_example_sources
    from gemma_jax.data.source import BadRecord, Example
    from gemma_jax.pretrained.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(config.init_from).tokenizer()
    if tokenizer is None:
        raise UserError(f"{config.init_from} has no tokenizer; put its tokenizer.model beside the weights.")
    console = report_console()
    marks = ("", "") if console.is_terminal else ("⟦", "⟧")

    def left_out(error: BadRecord) -> None:
        print(f"left out: {error}", file=sys.stderr)

    for source in open_example_sources(config.data, tokenizer, pairs=config.objective == "dpo"):
        found = ((shard, example) for shard in source.shards for example in source.read(shard, left_out))
        for shard, example in itertools.islice(found, config.examples * source.group_size):
            assert isinstance(example, Example)
            shortened = ", cut" if example.shortened else ""
            trained = int((example.weights > 0).sum())
            counts = f"{len(example.ids):,} tokens, {trained:,} trained{shortened}"
            console.print(f"{source.place(shard, example.number)}: {counts}", style="bold", markup=False)
            console.print(_marked(example, tokenizer, *marks), soft_wrap=True)
    return 0


def _load(name: str) -> PreviewOptions:
    base, _ = load(name, FinetuneConfig)
    return PreviewOptions(**{field.name: getattr(base, field.name) for field in dataclasses.fields(base)})


def _validate(config: PreviewOptions) -> None:
    validate_bounds(config)
    if not config.init_from:
        raise UserError("init_from is empty; name the checkpoint whose tokenizer makes the tokens.")


def _marked(example: "Example", tokenizer: "Tokenizer", opening: str, closing: str) -> "Text":
    """Returns the text of an example; tokens in the loss are green, between marks, and all others are dim."""
    from rich.text import Text

    from gemma_jax.commands.replay_report import printable, token_texts

    text = Text()
    for is_trained, span in itertools.groupby(
        token_texts(example.ids.tolist(), tokenizer), key=lambda token: bool(example.weights[token[0]].any())
    ):
        shown = printable("".join(part for _, part in span))
        text.append(f"{opening}{shown}{closing}" if is_trained else shown, "green" if is_trained else "dim")
    return text
