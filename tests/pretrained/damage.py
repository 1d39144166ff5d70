"""Damage to the bytes of a file, at random."""

import random
from collections.abc import Callable

Change = Callable[[random.Random, bytearray, int], None]


def damaged(rng: random.Random, raw: bytes, of_the_format: Change) -> bytes:
    """Returns the bytes after one to five changes: of a byte, the length, a gap, or what a format has.

    `of_the_format` changes the bytes that it is given, at a place if it likes.
    """
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(changed) or 1)
        match rng.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[place:]
            case 2:
                del changed[place : place + rng.randrange(1, 40)]
            case _:
                of_the_format(rng, changed, place)
    return bytes(changed)
