"""The script of `make gpu`, with a tiny model on CPU: all but the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tests", "train", "decode-7b"])
def test_each_part_of_make_gpu_runs(tmp_path: Path, part: str) -> None:
    command = [sys.executable, str(SCRIPT), part, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert len(results) == {"tests": 5, "train": 4, "decode-7b": 9}[part]
    for one in results:
        # A tiny model is so fast that noise may make a difference of times negative.
        assert one["tiny"] and one.keys() & {"tokens_per_second", "largest_difference"}
