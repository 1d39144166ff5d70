"""A base model learns to answer from a few hundred dialogues, and to end its answers."""

from pathlib import Path

import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import load
from gemma_jax.config.experiments import FinetuneConfig
from gemma_jax.data.examples import open_example_sources
from gemma_jax.data.source import Example, split_documents

pytestmark = pytest.mark.slow


def share_right(gemma: Gemma, end: int) -> float:
    """The share of held-out questions that get exactly the answer, and its end, of the dialogue."""
    config, _ = load("finetune_tiny", FinetuneConfig)
    (source,) = open_example_sources(config.data, gemma.tokenizer, pairs=False)
    prompts, answers = [], []
    for split, example in split_documents(source, source.shards[0], config.data.held_out, lambda _: None):
        assert isinstance(example, Example)
        if split == "held_out":
            first = int(example.weights.argmax())
            prompts.append([gemma.tokenizer.bos_id, *example.ids[:first].tolist()])
            answers.append(example.ids[first:].tolist())
    assert len(prompts) > 30
    made = gemma.generate(prompts, max_new_tokens=40)
    right = [
        one.token_ids == answer[: answer.index(end)] and one.finish_reason == "stop"
        for one, answer in zip(made, answers, strict=True)
    ]
    return sum(right) / len(right)


def test_answers_are_learnt(tmp_path: Path) -> None:
    base = tmp_path / "base"
    cache = ("--data.cache_dir", str(tmp_path / "cache"))
    assert main(["pretrain", "demo", "--run_dir", str(base), *cache]) == 0
    gemma = Gemma.from_pretrained(base, instruction_tuned=True)
    end = gemma.tokenizer.end_of_turn_id
    assert share_right(gemma, end) < 0.1
    tuned = {}
    for kind in ("", "nf4"):
        run = tmp_path / f"tuned{kind}"
        command = ["finetune", "finetune_tiny", "--init_from", str(base), "--run_dir", str(run), *cache]
        assert main([*command, "--quantization", kind, "--evaluation.every", "200"]) == 0
        tuned[kind] = share_right(Gemma.from_pretrained(run), end)
    assert tuned[""] >= 0.9
    assert tuned["nf4"] >= tuned[""] - 0.05
    pairs = ["finetune", "preferences_tiny", "--init_from", str(tmp_path / "tuned"), *cache]
    assert main([*pairs, "--run_dir", str(tmp_path / "preferred")]) == 0
    assert share_right(Gemma.from_pretrained(tmp_path / "preferred"), end) >= 0.9
