"""`gemma inspect`: the table, against arithmetic by hand."""

import re
from pathlib import Path

import pytest

from gemma_jax.cli import main
from tests.messages import naming


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, str], str]:
    """Rows of the table by parameter, and the summary."""
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == 0
    titles, *rows, summary = capsys.readouterr().out.splitlines()
    assert titles.startswith("parameter ")
    return {row.split()[0]: " ".join(row.split()[1:]) for row in rows}, summary


def held(rows: dict[str, str]) -> dict[str, int]:
    return {name: int(row.split()[-1].replace(",", "")) for name, row in rows.items()}


def test_gemma_2b_on_eight_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """One key/value head is on every device; all else is split by 8, norms by fsdp alone."""
    rows, summary = inspect(capsys, "gemma_2b", "--mesh.cpu_devices", "8", "--mesh.tensor", "2")
    expected = {
        "embedding": 4 * 256_000 * 2048 // 8,
        "blocks.attention.q": 4 * 18 * 2048 * 8 * 256 // 8,
        "blocks.attention.k": 4 * 18 * 2048 * 1 * 256 // 4,
        "blocks.attention.v": 4 * 18 * 2048 * 1 * 256 // 4,
        "blocks.attention.o": 4 * 18 * 8 * 256 * 2048 // 8,
        "blocks.feed_forward.gate": 4 * 18 * 2048 * 16_384 // 8,
        "blocks.feed_forward.up": 4 * 18 * 2048 * 16_384 // 8,
        "blocks.feed_forward.down": 4 * 18 * 16_384 * 2048 // 8,
        "blocks.attention_norm": 4 * 18 * 2048 // 4,
        "blocks.feed_forward_norm": 4 * 18 * 2048 // 4,
        "final_norm": 4 * 2048 // 4,
    }
    assert held(rows) == expected
    a_device = f"{sum(expected.values()):,}"
    assert re.search(naming("2,506,172,416", 11, a_device, 8, "data 1", "fsdp 4", "tensor 2"), summary)
    assert rows["embedding"].startswith("(256000, 2048) float32 vocab embed tensor fsdp ")
    assert rows["blocks.attention.k"].startswith(
        "(18, 2048, 1, 256) float32 layers embed kv_heads head_dim - fsdp - - "
    )
    assert rows["blocks.feed_forward.down"].startswith(
        "(18, 16384, 2048) float32 layers mlp embed - tensor fsdp "
    )


def test_everything_that_has_a_model_can_be_inspected(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = inspect(capsys, tiny_run)
    for name in (tiny_run / "config.json", tiny_run / "checkpoints" / "4"):
        assert inspect(capsys, name) == expected, name
    assert inspect(capsys, "gemma_tiny") == inspect(capsys, "random:gemma_tiny")
    changed, _ = inspect(capsys, tiny_run, "--model.num_layers", "5")
    assert changed["blocks.attention_norm"].startswith("(5, 32)")
    assert inspect(capsys, "demo")[0].keys() == expected[0].keys()
