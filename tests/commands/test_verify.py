"""`gemma verify`: what it prints, and which checkpoints it rejects."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_jax import verification
from gemma_jax.cli import main
from tests.golden import make
from tests.messages import naming
from tests.pretrained import published

HAS_TRANSFORMERS = bool(importlib.util.find_spec("transformers"))
UP = "model.layers.1.mlp.up_proj.weight"


def directory(folder: Path, shards: int = 1, dtype: str = "float32", up: np.ndarray | None = None) -> Path:
    """A directory of the golden 7B-like model, with another array in place of `up`."""
    tensors = make.tensors("multi_head", dtype)
    if up is not None:
        tensors[UP] = up
    return published.write_huggingface(folder, make.MULTI_HEAD, tensors, shards)


def checked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Returns the exit status and the report."""
    capsys.readouterr()
    status = main(["verify", *map(str, arguments), "--mesh.cpu_devices", "1"])
    return status, capsys.readouterr().out


def test_a_sound_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = checked(capsys, directory(tmp_path / "good", shards=3))
    assert status == 0
    lines = report.splitlines()
    assert re.search(naming("verdict", "sound", "shapes", "dtypes"), lines[-1])
    assert ("transformers" in lines[-1]) is HAS_TRANSFORMERS
    assert ("pip install transformers torch" in report) is not HAS_TRANSFORMERS
    assert any(re.search(naming(20, 9, 2, 2, "12,408", "float32"), line) for line in lines)
    sizes = naming("embed_dim 24", "hidden_dim 32", "num_heads 4", "num_kv_heads 4")
    assert any(re.search(sizes, line) for line in lines)
    # The row of layer 1 by numpy.
    tensors = make.tensors("multi_head")
    scale = 1 + tensors["model.layers.1.input_layernorm.weight"]
    row = next(line for line in lines if line.startswith("1 "))
    assert row.split()[1] == "0"
    assert f"{scale.mean():.2f} ({scale.min():.2f} to {scale.max():.2f})" in row
    assert f"{np.sqrt(np.mean(tensors[UP].astype(float) ** 2)):.4f}" in row


def test_numbers_that_are_not_finite_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = make.tensors("multi_head")[UP].copy()
    bad[3, 4:6] = np.nan, np.inf
    status, report = checked(capsys, directory(tmp_path, up=bad))
    assert status == 1
    *_, fault, verdict = report.splitlines()
    assert re.search(naming("fault", UP, f"{tmp_path}/model.safetensors", 2, "finite"), fault)
    assert verdict.startswith("verdict") and "sound" not in verdict


def test_against_another_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, rounded = directory(tmp_path / "good", 3), directory(tmp_path / "rounded", dtype="bfloat16")
    status, report = checked(capsys, good, "--against", rounded)
    assert status == 0
    assert re.search(naming("20 of 20", "equal", 20, "rounded"), report)
    assert str(rounded) in report.splitlines()[-1]

    nudged = make.tensors("multi_head")[UP].copy()
    nudged[0, 0] = np.nextafter(nudged[0, 0], np.float32(9))
    status, report = checked(capsys, good, "--against", directory(tmp_path / "nudged", up=nudged))
    assert status == 1
    assert (
        re.search(naming("19 of 20", "equal", UP, "1 of 20", "differ"), report) and "rounded " not in report
    )

    small = published.write_huggingface(tmp_path / "small", make.MULTI_QUERY, make.tensors("multi_query"), 1)
    status, report = checked(capsys, good, "--against", small)
    assert status == 1 and re.search(naming("fault", small, "num_kv_heads 4", 1), report)


def test_a_damaged_file_is_a_fault_and_a_missing_one_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut = directory(tmp_path / "good"), directory(tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, report = checked(capsys, cut)
    assert status == 1 and re.search(naming("fault", weights, "whole"), report)
    assert main(["verify", str(good), "--against", str(tmp_path / "nothing")]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "status"), [(1 + 1e-6, 0), (1.01, 1)])
def test_what_transformers_computes_is_compared_layer_by_layer(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    status: int,
) -> None:
    """Our own outputs, slightly changed from layer 1 on, replace those of transformers."""
    layer_outputs, ours = verification.layer_outputs, {}

    def remembered(*arguments: Any) -> dict[str, np.ndarray]:
        ours.update(layer_outputs(*arguments))
        return ours

    def imitation(folder: Path, dtype: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        assert dtype == "float32" and tokens.shape[0] == 1 and tokens[0, 0] == 2
        return {name: x * (1 if name in ("embeddings", "layer_0") else factor) for name, x in ours.items()}

    monkeypatch.setattr(verification, "layer_outputs", remembered)
    monkeypatch.setattr(verification, "transformers_outputs", imitation)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    actual, report = checked(capsys, directory(tmp_path))
    assert actual == status
    faults = [line for line in report.splitlines() if line.startswith("fault")]
    assert any("layer 1 " in line for line in faults) is bool(status)
    assert not any("layer 0 " in line for line in faults)
