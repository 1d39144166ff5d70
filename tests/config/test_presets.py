"""Presets against the published shapes, and the configs that come with the repository."""

from pathlib import Path

import pytest

from gemma_jax.config import PRESETS, PretrainConfig, TransformerConfig, load, validate
from gemma_jax.errors import UserError

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


def parameters(model: TransformerConfig) -> int:
    """Counted by hand: embedding, blocks (q, o, k, v, gate, up, down, two norms), final norm."""
    attention = 2 * model.embed_dim * model.head_dim * (model.num_heads + model.num_kv_heads)
    block = attention + 3 * model.embed_dim * model.hidden_dim + 2 * model.embed_dim
    return model.vocab_rows * model.embed_dim + model.num_layers * block + model.embed_dim


def test_sizes_of_the_presets() -> None:
    counts = {name: parameters(model) for name, model in PRESETS.items()}
    assert counts["gemma_2b"] == 2_506_172_416 and counts["gemma_7b"] == 8_537_680_896
    assert counts["gemma_110m"] == 124_865_280
    # Those for a few minutes on a CPU and for tests may be tuned, but must stay what they are for.
    assert counts["gemma_small"] < 10e6 and counts["gemma_tiny"] < 100e3


@pytest.mark.parametrize(("vocab_size", "multiple", "rows"), [
    (256_000, 128, 256_000), (256_000, 256_128, 256_128), (500, 64, 512), (512, 64, 512), (1, 64, 64),
    (500, 1, 500),
])  # fmt: skip
def test_embedding_rows_are_rounded_up(vocab_size: int, multiple: int, rows: int) -> None:
    assert TransformerConfig(vocab_size=vocab_size, vocab_multiple=multiple).vocab_rows == rows


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_the_repository_are_found_by_their_names_and_contradict_nothing(name: str) -> None:
    config, called = load(name, PretrainConfig)
    validate(config)
    assert called == name
    with pytest.raises(UserError) as error:
        load(f"{name}-", PretrainConfig)
    assert f"did you mean {name}?" in str(error.value)
    assert all(name in str(error.value).split("one of:")[1] for name in CONFIGS)


def test_the_demo_is_there() -> None:
    assert "demo" in CONFIGS
