"""What a run tells: its file, the terminal, TensorBoard, Weights & Biases, and the picture."""

import struct
import sys
from pathlib import Path

import jax
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from gemma_jax.config import LoggingConfig, PretrainConfig
from gemma_jax.errors import UserError
from gemma_jax.training import metrics
from gemma_jax.training.metrics import RunLog, read_metrics
from gemma_jax.training.sinks import Entry, check_sinks, open_sinks

SHOWN = {
    "loss": 3.0,
    "learning_rate": 1e-3,
    "tokens_per_second": 1_234_567.0,
    "flops_per_second": 12.3e12,
    "input_wait_share": 0.0,
}


def written(step: int, **more: float) -> Entry:
    """An entry that goes into the file."""
    return {"step": step, **SHOWN, "peak_memory_bytes": 10**9, "goodput": 0.97, **more}


class Remembering:
    """A sink that keeps what it is given."""

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


def test_a_log_in_a_bucket_is_written_each_minute_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = MemoryFileSystem()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: filesystem)
    run_dir = epath.Path("gs://bucket/run")
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = RunLog(run_dir, 10, start)
        for step in steps:
            now += 40.0
            log.training(written(step), 0)
            assert len(read_metrics(run_dir)) == start + (step - start) // 2 * 2
        log.close()
        assert [entry["step"] for entry in read_metrics(run_dir)] == list(range(1, steps[-1] + 1))


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


def tensorboard_scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would show, read without it."""
    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[tuple[str, int], float] = {}
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.session_log.status == event.session_log.START:
                scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
    return scalars


def test_tensorboard_shows_every_number_once_after_a_resume(tmp_path: Path) -> None:
    config = PretrainConfig(logging=LoggingConfig(tensorboard="on"))
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = RunLog(tmp_path, 10, start, open_sinks(config, epath.Path(tmp_path), start))
        for step in steps:
            log.training(written(step, loss=float(10 * start + step)), 0)
        log.evaluation({"step": steps[-1], "held_out_loss": 2.5, "held_out_bits_per_byte": 1.0})
        log.close()
    scalars = tensorboard_scalars(tmp_path / "tensorboard")
    assert {step: value for (tag, step), value in scalars.items() if tag == "loss"} == {
        1: 1,
        2: 2,
        3: 23,
        4: 24,
    }
    assert scalars["held_out_loss", 4] == 2.5 and ("held_out_loss", 3) not in scalars
    assert not {tag for tag, _ in scalars} & {"step", "time"}


@pytest.mark.parametrize(
    ("package", "logging"),
    [
        ("wandb", LoggingConfig(wandb_project="gemmas")),
        ("tensorboardX", LoggingConfig(tensorboard="on")),
    ],
)
def test_a_sink_whose_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, package: str, logging: LoggingConfig
) -> None:
    check_sinks(LoggingConfig())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        check_sinks(logging)
