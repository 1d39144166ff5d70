"""What the time of a run is spent on, and how much of it trains."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = (
    "steps",  # that count: the only time that trains
    "starting",  # from the start of the process to the end of its first step: loading, restoring, compiling
    "waiting",  # for data, while no step was running
    "evaluating",
    "saving",  # as far as training waited for it
    "lost",  # steps that were not finite, or were done again after a kill or a spike
)


class Goodput:
    """Seconds of a run by what they were spent on, over all its processes one after the other.

    Goodput is the share of steps in all of them. Time in which no process ran counts for nothing: it is not
    known whether the run waited for a machine or for its owner. Neither does what a process did after its
    last line of the log, if it was killed.
    """

    def __init__(self, started: float, before: Mapping[str, float]) -> None:
        """Args:
        started: when this process began, by `time.monotonic`.
        before: seconds of the processes before it, from `seconds_before`.
        """
        self._seconds = {kind: before.get(kind, 0.0) for kind in KINDS}
        self._since = started
        self._compiled = False

    def record(self, kind: str) -> float:
        """Count the time since the last call as one of KINDS; returns the seconds."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        self._seconds[kind] += seconds
        return seconds

    def step_ended(self, waited: float, finite: bool) -> None:
        """Count the time since the last call as a step, of which it `waited` so many seconds for data."""
        if not self._compiled:
            self.record("starting")
            self._compiled = True
            return
        kind = "steps" if finite else "lost"
        waited = min(waited, self.record(kind))
        self._seconds[kind] -= waited
        self._seconds["waiting"] += waited

    def entry(self) -> dict[str, float]:
        """`goodput` and `seconds_KIND` for the log."""
        total = sum(self._seconds.values())
        shown = {f"seconds_{kind}": round(seconds, 3) for kind, seconds in self._seconds.items()}
        return {"goodput": self._seconds["steps"] / total if total else 0.0, **shown}


def seconds_before(entries: Sequence[Mapping[str, Any]], start: int) -> dict[str, float]:
    """Seconds by kind of the processes that wrote a log, if the run resumes at step `start`.

    Args:
      entries: of the log, oldest first.
      start: later steps are done again, so the time that they took is lost.
    """
    told = [entry for entry in entries if "seconds_steps" in entry]
    if not told:
        return {}
    seconds = {kind: float(told[-1].get(f"seconds_{kind}", 0)) for kind in KINDS}
    kept = [float(entry["seconds_steps"]) for entry in told if entry["step"] <= start]
    lost = seconds["steps"] - (kept[-1] if kept else 0.0)
    return seconds | {"steps": seconds["steps"] - lost, "lost": seconds["lost"] + lost}
