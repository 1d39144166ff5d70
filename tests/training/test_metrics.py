"""The outputs of a run's metrics: file, terminal, TensorBoard, Weights & Biases, and the plot."""

from pathlib import Path

import jax
import pytest
from etils import epath

from gemma_jax.config import LoggingConfig, PretrainConfig
from gemma_jax.training import metrics
from gemma_jax.training.metrics import RunLog, read_metrics
from gemma_jax.training.sinks import Entry, open_sinks

SHOWN = {
    "loss": 3.0,
    "learning_rate": 1e-3,
    "tokens_per_second": 1_234_567.0,
    "flops_per_second": 12.3e12,
    "input_wait_share": 0.0,
}


def written(step: int, **more: float) -> Entry:
    """Returns a log entry as it is written to the file."""
    return {"step": step, **SHOWN, "peak_memory_bytes": 10**9, "goodput": 0.97, **more}


class Remembering:
    """A sink that keeps its entries in a list."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.closed = False

    def write(self, entry: Entry) -> None:
        self.entries.append(entry)

    def close(self) -> None:
        self.closed = True


def test_a_resumed_log_drops_the_steps_that_are_done_again_and_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    log = RunLog(tmp_path, 10, 0)
    for step in (1, 2, 3):
        now = 10.0 * step
        log.training(written(step), 0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    now = 1000.0
    sink = Remembering()
    log = RunLog(tmp_path, 10, 2, [sink])
    now = 1005.0
    log.training(written(3), 0)
    log.close()
    assert [(entry["step"], entry["seconds"]) for entry in read_metrics(tmp_path)] == [
        (1, 10),
        (2, 20),
        (3, 25),
    ]
    assert sink.closed and sink.entries == read_metrics(tmp_path)[2:]


def test_only_announced_steps_are_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, 0)
    log.training({"step": 1, **SHOWN}, 0)
    log.training(written(2), 0)
    log.evaluation({"step": 2, "held_out_loss": 2.0, "held_out_bits_per_byte": 1.0})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [2, 2]


def test_other_processes_write_and_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    config = PretrainConfig(logging=LoggingConfig(tensorboard="on"))
    assert open_sinks(config, epath.Path(tmp_path), 0) == []
    sink = Remembering()
    log = RunLog(tmp_path, 10, 0, [sink])
    log.message("hello")
    log.training(written(1), 0)
    log.close()
    assert list(tmp_path.iterdir()) == [] and sink.entries == [] and capsys.readouterr().err == ""
