"""The notice that the Gemma terms of use require beside weights that are derived from Google's."""

from pathlib import Path
from typing import TYPE_CHECKING

from gemma_jax.config import PRESETS
from gemma_jax.paths import read_bytes

if TYPE_CHECKING:
    from etils import epath

NOTICE_FILE = "NOTICE"
# The sentence that section 3.1 of the terms requires.
SENTENCE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
# Weights in a published form, with a shape that Google published, are assumed to be Google's.
PUBLISHED_SHAPES = (PRESETS["gemma_2b"], PRESETS["gemma_7b"])


def has_notice(folder: "Path | epath.Path") -> bool:
    """Whether a directory has a notice that its weights are under the Gemma terms."""
    path = folder / NOTICE_FILE
    return path.is_file() and b"gemma terms of use" in read_bytes(path).lower()


def write_notice(folder: Path, source: str, dtype: str) -> None:
    """Write the notice. It also states what was done to the weights, as the terms require."""
    text = f"{SENTENCE}.\n\nThese weights were read from {source} and written as {dtype} by gemma_jax.\n"
    (folder / NOTICE_FILE).write_text(text)
