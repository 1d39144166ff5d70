"""Caches the analysis of each compiled program, so that repeating a plan takes no compilation.

The key is a hash of the program's text before compilation, the topology, the compiler's options and version,
and the version of the cache format. Entries are plain JSON, because a cache is untrusted like any other file.
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

FORMAT = 5  # version of the entries; increase it when the meaning of Analysis changes


@dataclasses.dataclass(frozen=True)
class Entry:
    """The result of compiling a program: its analysis, or how much memory it needs if it does not fit."""

    analysis: Analysis | None  # None if it does not fit
    needed: int | None = None  # bytes per device, if it does not fit and the compiler reports them
    available: int | None = None


def key_of(program: str, topology: str, options: Mapping[str, str], version: str) -> str:
    """Returns the name of a program's entry."""
    identity = json.dumps([FORMAT, program, topology, sorted(options.items()), version])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


class PlanCache:
    """A folder with one file per entry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Entry | None:
        """Returns the entry, or None if there is no readable one."""
        try:
            return _entry(json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None  # missing, of another version, or broken: the program is compiled again

    def put(self, key: str, entry: Entry) -> None:
        """Store an entry atomically, because several plans may be made at once."""
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
