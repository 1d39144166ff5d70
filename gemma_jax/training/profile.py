"""Records traces of chosen steps for xprof."""

import jax

from gemma_jax.config import TrainingConfig, profiled_steps
from gemma_jax.paths import user_path


class Profiler:
    """Traces the steps of a range, in the first process of a job."""

    def __init__(self, config: TrainingConfig) -> None:
        """Args:
        config: The config of the run. Its `profile` selects the steps, if any. Both
          `xprof --logdir RUN/profile` and TensorBoard's profile plugin read the traces.
        """
        self._steps, self._tracing = profiled_steps(config.profile), False
        self._folder = user_path(config.run_dir) / "profile"

    def begins(self, step: int) -> bool:
        """Whether the trace begins with this step: the first of the range, or a later one after a restart."""
        return step in self._steps and not self._tracing

    def ends(self, step: int) -> bool:
        """Whether the trace ends with this step."""
        return self._tracing and step + 1 not in self._steps

    def start(self) -> None:
        """Start the trace. No step may be running on the devices."""
        self._tracing = True
        if jax.process_index() == 0:
            jax.profiler.start_trace(str(self._folder))

    def stop(self) -> None:
        """Stop the trace and write it, if one was started."""
        if self._tracing and jax.process_index() == 0:
            jax.profiler.stop_trace()
        self._tracing = False
