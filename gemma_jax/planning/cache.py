"""What was learnt of a program is kept, so that a plan made again is there at once.

The key is the program itself: its text before compilation, the topology, the compiler's options and version,
and the version of what is kept. JSON only: a cache is no more to be trusted than any other file.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_jax.planning.analysis import Analysis, Cost, Kernel
from gemma_jax.planning.collectives import Collective

FORMAT = 3  # of the entries; to be raised when Analysis changes its meaning


@dataclasses.dataclass(frozen=True)
class Entry:
    """What compiling a program said: how it runs, or how much memory it lacks."""

    analysis: Analysis | None  # None if it does not fit
    needed: int | None = None  # bytes a device, where it does not fit and the compiler says so
    available: int | None = None


def key_of(program: str, topology: str, options: Mapping[str, str], version: str) -> str:
    """The name of a program's entry."""
    identity = json.dumps([FORMAT, program, topology, sorted(options.items()), version])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


class PlanCache:
    """A folder of entries."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Entry | None:
        """The entry, or None if there is none that can be read."""
        try:
            return _entry(json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None  # none, of another version, or broken: the program is compiled again

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry; whole or not at all, for several plans may be made at once."""
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / f"{key}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(dataclasses.asdict(entry)), encoding="utf-8")
        unfinished.replace(self._folder / f"{key}.json")


def _entry(data: Any) -> Entry:
    analysis = data["analysis"]
    if analysis is not None:
        collectives = [Collective(**{**c, "arrays": tuple(c["arrays"])}) for c in analysis["collectives"]]
        parts = {
            "kernels": tuple(Kernel(**kernel) for kernel in analysis["kernels"]),
            "collectives": tuple(collectives),
            "costs": tuple(Cost(**cost) for cost in analysis["costs"]),
        }
        analysis = Analysis(**{**analysis, **parts})
    return Entry(analysis, data["needed"], data["available"])
