"""What ends an answer: one id or a list in generation_config.json, the name, or the caller."""

from pathlib import Path

import pytest

from gemma_jax import Gemma
from gemma_jax.config import MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.pretrained.end_tokens import end_tokens
from tests.pretrained.published import MULTI_QUERY, random_tensors, write_huggingface


@pytest.mark.parametrize(("name", "config", "known", "expected"), [
    ("runs/demo", None, None, (1,)),
    ("google/gemma-2b", '{"eos_token_id": 1}', None, (1,)),
    ("google/gemma-2b", '{"eos_token_id": [1, 107]}', None, (1, 107)),
    ("google/gemma-2b", '{"eos_token_id": null}', None, (1,)),
    # Google's first instruction-tuned checkpoints list <eos> alone.
    ("google/gemma-1.1-7b-it", '{"eos_token_id": 1}', None, (1, 107)),
    ("google/gemma/flax/2b-it/2", None, None, (1, 107)),
    ("google/gemma-it-none@main", None, None, (1,)),
    ("runs/demo", None, True, (1, 107)),
    ("google/gemma-2b-it", '{"eos_token_id": [1, 107]}', False, (1,)),
    ("google/gemma-2b", '{"eos_token_id": [5, 1]}', None, (1, 5)),
])  # fmt: skip
def test_end_tokens(
    tmp_path: Path, name: str, config: str | None, known: bool | None, expected: tuple[int, ...]
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(config)
    assert end_tokens(name, str(tmp_path), instruction_tuned=known) == expected


@pytest.mark.parametrize("content", [
    '{"eos_token_id": "1"}', '{"eos_token_id": [1, 2.5]}', '{"eos_token_id": -1}', '{"eos_token_id": true}',
    '{"eos_token_id": 3000000000}', '{"eos_token_id": {"a": 1}}', '{"eos_token_id": [[1]]}',
    '{"eos_token_id": 1', "", "\xff\xfe", "[" * 100_000,
])  # fmt: skip
def test_a_broken_generation_config_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="generation_config.json"):
        end_tokens("x", str(tmp_path))


def test_generation_ends_at_every_listed_token(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path, MULTI_QUERY, random_tensors(MULTI_QUERY))

    def answer() -> tuple[list[int], str]:
        gemma = Gemma.from_pretrained(folder, mesh=MeshConfig(cpu_devices=1))
        [generation] = gemma.generate([[2, 30, 31]], max_new_tokens=8)
        return generation.token_ids, generation.finish_reason

    free, reason = answer()
    assert reason == "length"
    end = next(i for i in range(1, 8) if free[i] not in free[:i])
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [1, {free[end]}]}}')
    assert answer() == (free[:end], "stop")
