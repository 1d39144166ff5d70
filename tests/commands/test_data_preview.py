"""gemma data-preview: the first examples with the trained tokens marked, on a terminal and in a file."""

import json
import re
from pathlib import Path

import pytest

from gemma_jax.cli import main
from gemma_jax.config import ExampleDataConfig, FinetuneConfig, to_json
from tests.messages import naming


@pytest.fixture
def config(tmp_path: Path, tiny_run: Path) -> str:
    records = [
        {"prompt": f"alpha {n}\x1b[31m", "completion": "beta日", "chosen": "beta", "rejected": "mu"}
        for n in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = ExampleDataConfig(sources=(str(tmp_path / "a.jsonl"),), cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "tune.json"
    path.write_text(to_json(FinetuneConfig(init_from=str(tiny_run), data=data)))
    return str(path)


def test_trained_tokens_are_marked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data-preview", config, "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("a.jsonl, line ") == 2 and "alpha 1\\x1b" in shown and "alpha 2" not in shown
    answer = "<start_of_turn>model\n⟦beta日<end_of_turn>\n⟧"
    assert shown.count(answer) == 2 == shown.count("⟦")
    for tokens, trained in re.findall(r"line \d: (\d+) tokens, (\d+) trained", shown):
        assert 0 < int(trained) < int(tokens) - 8


def test_pairs_on_a_terminal_are_coloured(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert main(["data-preview", config, "--examples", "1", "--objective", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert "⟦" not in shown and len(re.findall(r"\x1b\[32m(beta|mu)<end_of_turn>", shown)) == 2


def test_a_config_without_a_checkpoint(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data-preview", config, "--init_from", ""]) == 2
    assert re.search(naming("init_from"), capsys.readouterr().err)
