"""Accounts for the time of a run: what it is spent on, and what share of it trains."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = (
    "steps",  # steps that count: the only time that trains
    "starting",  # from the start of the process to the end of its first step: load, restore, compile
    "waiting",  # waits for data while no step was running
    "evaluating",
    "saving",  # only the part that training waited for
    "lost",  # steps that were not finite, or had to be repeated after a kill or a spike
)


class Goodput:
    """The seconds of a run by what they were spent on, summed over its successive processes.

    Goodput is the share of "steps" in the total. Time in which no process ran is not counted: nobody knows
    whether the run waited for a machine or for its owner. If a process was killed, its time after its last
    line in the log is not counted either.
    """

    def __init__(self, started: float, before: Mapping[str, float]) -> None:
        """Args:
        started: The time at which this process began, from `time.monotonic`.
        before: The seconds by kind of earlier processes, from `seconds_before`.
        """
        self._seconds = {kind: before.get(kind, 0.0) for kind in KINDS}
        self._since = started
        self._compiled = False

    def record(self, kind: str) -> float:
        """Count the time since the last call as `kind`, one of KINDS, and return it in seconds."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        self._seconds[kind] += seconds
        return seconds

    def step_ended(self, waited: float, finite: bool) -> None:
        """Count the time since the last call as a step, and `waited` seconds of it as waiting for data."""
        if not self._compiled:
            self.record("starting")
            self._compiled = True
            return
        kind = "steps" if finite else "lost"
        waited = min(waited, self.record(kind))
        self._seconds[kind] -= waited
        self._seconds["waiting"] += waited

    def entry(self) -> dict[str, float]:
        """Returns `goodput` and one `seconds_KIND` per kind, for the log."""
        total = sum(self._seconds.values())
        shown = {f"seconds_{kind}": round(seconds, 3) for kind, seconds in self._seconds.items()}
        return {"goodput": self._seconds["steps"] / total if total else 0.0, **shown}


def seconds_before(entries: Sequence[Mapping[str, Any]], start: int) -> dict[str, float]:
    """Returns the seconds by kind of the earlier processes of a run that resumes at step `start`.

    Args:
      entries: The entries of the log, oldest first.
      start: The step to resume at. Later steps are repeated, so their time counts as lost.
    """
    told = [entry for entry in entries if "seconds_steps" in entry]
    if not told:
        return {}
    seconds = {kind: float(told[-1].get(f"seconds_{kind}", 0)) for kind in KINDS}
    kept = [float(entry["seconds_steps"]) for entry in told if entry["step"] <= start]
    lost = seconds["steps"] - (kept[-1] if kept else 0.0)
    return seconds | {"steps": seconds["steps"] - lost, "lost": seconds["lost"] + lost}
