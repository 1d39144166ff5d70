"""Which tokens end an answer, and so whether a checkpoint is an instruction-tuned one.

A model is instruction-tuned where `<end_of_turn>` is among its end tokens. Published checkpoints do not say
so in one place: generation_config.json lists the token in newer ones only, and the Flax form has no mark.
"""

import os
import re
from pathlib import Path

from gemma_jax.errors import UserError
from gemma_jax.pretrained.published_config import CONFIG_FILE, GENERATION_FILE, read_object
from gemma_jax.tokenizer import Tokenizer

EOS = Tokenizer.eos_id
# Behind the name may stand a revision of the Hub (@main) or a version of Kaggle's (/2).
_NAMED_SO = re.compile(r"-it(@[\w./-]+|/\d+)?/*$", re.IGNORECASE)
END_OF_TURN = 107  # in Gemma's tokenizer, and in those that we train


def end_tokens(name: str, folder: str = "", *, instruction_tuned: bool | None = None) -> tuple[int, ...]:
    """The ids that end an answer.

    Args:
      name: what the checkpoint is called. Names of instruction-tuned weights end in `-it`, as Google's do.
      folder: that may hold a generation_config.json or else a config.json, whose `eos_token_id` is one id or
        a list; its name counts too. Empty: nowhere.
      instruction_tuned: what the caller knows; None decides by the file and the names.

    Raises:
      UserError: the file cannot be read, or its eos_token_id is no token id or list of them.
    """
    ids = {EOS}
    # Only published weights come with the file, and those are never read from a bucket in place.
    files = [Path(folder) / file for file in (GENERATION_FILE, CONFIG_FILE) if folder]
    for path in [file for file in files if os.path.lexists(file)][:1]:  # transformers has this order too
        ids |= set(_listed(path))
    if instruction_tuned is None:
        # The Hub's cache has OWNER/NAME as models--OWNER--NAME/snapshots/REVISION.
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
