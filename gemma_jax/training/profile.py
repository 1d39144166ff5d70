"""Traces of chosen steps, for xprof."""

import jax
from etils import epath


class Profiler:
    """Traces the steps of a range, in the first process of a job."""

    def __init__(self, steps: range, folder: epath.Path) -> None:
        """Args:
        steps: may be none.
        folder: `xprof --logdir FOLDER` and TensorBoard's profile plugin read it.
        """
        self._steps, self._folder, self._tracing = steps, folder, False

    def begins(self, step: int) -> bool:
        """Whether the trace begins with this step, also in the middle of the range after a restart."""
        return step in self._steps and not self._tracing

    def ends(self, step: int) -> bool:
        """Whether the trace ends with this step."""
        return self._tracing and step + 1 not in self._steps

    def start(self) -> None:
        """Begin; nothing may be running on the devices."""
        self._tracing = True
        if jax.process_index() == 0:
            jax.profiler.start_trace(str(self._folder))

    def stop(self) -> None:
        """Write the trace, if one was begun."""
        if self._tracing and jax.process_index() == 0:
            jax.profiler.stop_trace()
        self._tracing = False
