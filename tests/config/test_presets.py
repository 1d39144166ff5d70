"""Presets against the published shapes, and the configs that come with the repository."""

from pathlib import Path

import pytest

from gemma_jax.config import PRESETS, TrainingConfig, TransformerConfig, load, validate, validate_model
from gemma_jax.errors import UserError
from tests.messages import naming

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py"))


def test_published_shapes() -> None:
    """Gemma: Open Models Based on Gemini Research and Technology (2024), table 1 and section 2."""
    common: dict[str, float] = {"vocab_size": 256_000, "head_dim": 256, "context_length": 8192}
    common |= {"rope_base": 10_000.0, "norm_epsilon": 1e-6}
    fields = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "num_kv_heads")
    published = {
        "gemma_2b": (18, 2048, 16_384, 8, 1),
        "gemma_7b": (28, 3072, 24_576, 16, 16),
    }
    for name, shape in published.items():
        for field, value in (common | dict(zip(fields, shape, strict=True))).items():
            assert getattr(PRESETS[name], field) == value, f"{name}.{field}"
        assert PRESETS[name].vocab_rows == 256_000


@pytest.mark.parametrize(("vocab_size", "multiple", "rows"), [
    (256_000, 128, 256_000), (256_000, 256_128, 256_128), (500, 64, 512), (512, 64, 512), (1, 64, 64),
    (500, 1, 500),
])  # fmt: skip
def test_embedding_rows_are_rounded_up(vocab_size: int, multiple: int, rows: int) -> None:
    assert TransformerConfig(vocab_size=vocab_size, vocab_multiple=multiple).vocab_rows == rows


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_the_repository_are_found_by_their_names_and_contradict_nothing(name: str) -> None:
    config, called = load(name, TrainingConfig)
    validate(config)
    assert called == name and "demo" in CONFIGS
    with pytest.raises(UserError, match=naming(f"'{name}-'", name)):
        load(f"{name}-", TrainingConfig)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_contradict_nothing(name: str) -> None:
    validate_model(PRESETS[name])
