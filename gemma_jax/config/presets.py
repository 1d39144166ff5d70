"""Named model shapes."""

from gemma_jax.config.sections import TransformerConfig
from gemma_jax.config.serialization import suggestion
from gemma_jax.errors import UserError

PRESETS = {
    # The published models (Gemma: Open Models Based on Gemini Research and Technology, 2024, table 1).
    "gemma_2b": TransformerConfig(),
    "gemma_7b": TransformerConfig(
        num_layers=28, embed_dim=3072, hidden_dim=24_576, num_heads=16, num_kv_heads=16
    ),
    # Smaller models of the same architecture: for benchmarks, for minutes on a CPU, and for tests.
    "gemma_110m": TransformerConfig(
        vocab_size=32_000,
        num_layers=12,
        embed_dim=768,
        hidden_dim=3072,
        num_heads=12,
        head_dim=64,
        context_length=2048,
    ),
    "gemma_small": TransformerConfig(
        vocab_size=2048,
        num_layers=4,
        embed_dim=192,
        hidden_dim=768,
        num_heads=3,
        head_dim=64,
        context_length=1024,
    ),
    "gemma_tiny": TransformerConfig(
        vocab_size=512,
        num_layers=2,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context_length=256,
        vocab_multiple=64,
    ),
}


def preset(name: str) -> TransformerConfig:
    """Returns the model shape called `name`. Raises UserError if there is none."""
    if name not in PRESETS:
        raise UserError(
            f"there is no preset {name!r}{suggestion(name, PRESETS)}; the presets are {', '.join(PRESETS)}."
        )
    return PRESETS[name]
