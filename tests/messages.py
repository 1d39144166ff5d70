"""What a test may ask of a message: the data that it names, not its wording."""

import re


def naming(*data: object) -> str:
    """A pattern for a message that names all of these, in this order, whatever it says in between.

    A word or number is found as a whole: 8 is neither in 18 nor in 8.5, nor `steps` in `warmup_steps`.
    """
    return r"(?s:.*)".join(map(_whole, map(str, data)))


def _whole(text: str) -> str:
    before = r"(?<![\w.])" if re.match(r"\w", text) else ""
    after = r"(?!\w|[.,]\d)" if re.search(r"\w$", text) else ""
    return before + re.escape(text) + after
