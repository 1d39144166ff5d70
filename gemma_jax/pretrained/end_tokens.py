"""Finds the tokens that end an answer, which also show whether a checkpoint is instruction-tuned.

A model counts as instruction-tuned if `<end_of_turn>` is among its end tokens. Published checkpoints do not
record this in one place: only newer ones list the token in generation_config.json, and the Flax form does not
record it at all.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from gemma_jax.errors import UserError
from gemma_jax.pretrained.published_config import CONFIG_FILE, GENERATION_FILE, read_object
from gemma_jax.tokenizer import Tokenizer

EOS = Tokenizer.eos_id
# The name may be followed by a revision on the Hub (@main), a version on Kaggle (/2), or what a GGUF file has
# at its end (.Q4_K_M.gguf).
_NAMED_SO = re.compile(r"-it(@[\w./-]+|/\d+|([.-]\w+)?\.gguf)?/*$", re.IGNORECASE)
END_OF_TURN = 107  # the id in Gemma's tokenizer and in those that we train


def end_tokens(
    name: str, folder: str = "", *, instruction_tuned: bool | None = None, stored: Iterable[int] = ()
) -> tuple[int, ...]:
    """Returns the token ids that end an answer.

    Args:
      name: The name of the checkpoint. If it ends in `-it`, as Google's names do, the weights count as
        instruction-tuned.
      folder: The directory of the checkpoint, or empty. Its name is examined like `name`. The `eos_token_id`
        (one id or a list) is read from its generation_config.json or, without one, from its config.json.
      instruction_tuned: Whether the weights are instruction-tuned, if the caller knows; None decides by the
        file and the names.
      stored: The ids that the weights' own file lists, as a GGUF file does.

    Raises:
      UserError: The file cannot be read, or its eos_token_id is neither a token id nor a list of them.
    """
    ids = {EOS, *stored}
    # Only published weights have these files, and those are never read directly from a bucket.
    files = [Path(folder) / file for file in (GENERATION_FILE, CONFIG_FILE) if folder]
    for path in [file for file in files if os.path.lexists(file)][:1]:  # transformers uses the same order
        ids |= set(_listed(path))
    if instruction_tuned is None:
        # The Hub's cache stores OWNER/NAME as models--OWNER--NAME/snapshots/REVISION.
        parts = Path(os.path.abspath(folder)).parts if folder else ()
        places = (name, *parts[-1:], *(part for part in parts if part.startswith("models--")))
        named = any(_NAMED_SO.search(place) for place in places)
        instruction_tuned = END_OF_TURN in ids or named
    return tuple(sorted(ids | {END_OF_TURN} if instruction_tuned else ids - {END_OF_TURN}))


def _listed(path: Path) -> list[int]:
    listed = read_object(path).get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    wrong = [value for value in ids if type(value) is not int or not 0 <= value < 2**31]
    if wrong:
        raise UserError(
            f"{path} has {str(wrong[0]):.80} as eos_token_id, but must hold a token id or a list of them."
        )
    return ids
