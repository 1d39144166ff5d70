"""Where other implementations of Gemma went wrong: each mistake, made on purpose, is caught.

The checks are those of test_parity.py against golden values, and a few of exact token ids. Here each one
passes as the code is, and fails once the trap is set.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gemma_jax import Gemma
from gemma_jax.config import MeshConfig, PretrainConfig
from gemma_jax.data import packing
from gemma_jax.data.chat import encode_dialogue
from gemma_jax.model import Transformer, attention, layers, ops, transformer
from gemma_jax.sharding import named_arrays, with_arrays
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training import step
from gemma_jax.training.loss import LossSettings
from tests import test_parity as parity
from tests.golden import make

pytestmark = pytest.mark.slow

exact_norm, exact_attend, exact_settings = ops.rms_norm, attention.causal_attend, step.loss_settings
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module", params=make.CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> parity.Case:
    return parity.golden_case(request.param, tmp_path_factory.mktemp("huggingface"))


def in_place_of(name: str, function: Callable[..., object], *modules: object) -> Patch:
    """Puts a function in the place of the one of that name, wherever it was imported to."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in modules:
            monkeypatch.setattr(module, name, function)

    return patch


def norm_without_one(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return exact_norm(x, scale - 1, epsilon)


def norm_cast_before_the_scale(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return exact_norm(x, jnp.zeros_like(scale), epsilon) * (1 + scale)


def embedding_without_rounded_factor(model: Transformer, tokens: jax.Array) -> jax.Array:
    rows = jnp.take(model.embedding[...], tokens, axis=0).astype(jnp.float32)
    return (rows * model.config.embed_dim**0.5).astype(model.dtype)


def embedding_without_factor(model: Transformer, tokens: jax.Array) -> jax.Array:
    return jnp.take(model.embedding[...], tokens, axis=0).astype(model.dtype)


def rope_of_rounded_angles(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    return ops.rope(x, jax.lax.reduce_precision(jnp.asarray(positions, jnp.float32), 8, 7), base)


def interleaved_rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    halves = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    first, second = jnp.split(ops.rope(halves, positions, base), 2, axis=-1)
    return jnp.stack([first, second], axis=-1).reshape(x.shape)


def scaled_by_width(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array
) -> jax.Array:
    wrong = make.MULTI_QUERY["hidden_size"] / make.MULTI_QUERY["num_attention_heads"]
    factor = (make.MULTI_QUERY["head_dim"] / wrong) ** 0.5
    return exact_attend(q * factor, k, v, positions, segments)


def attend_with_rounded_softmax(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(mask[:, None], jnp.einsum("BLNH,BSNH->BNLS", q, k), -1e30)
    weights = jax.nn.softmax(scores.astype(jnp.bfloat16), axis=-1).astype(q.dtype)
    return jnp.einsum("BNLS,BSNH->BLNH", weights, v)


def set_rounded_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Transformer.logits
    rounded = lambda self, hidden: exact(self, hidden).astype(jnp.bfloat16)  # noqa: E731
    monkeypatch.setattr(Transformer, "logits", rounded)


def unmasked(logits: jax.Array, vocab_size: int) -> jax.Array:
    return logits


def settings_of_all_rows(config: PretrainConfig, mesh: Mesh) -> LossSettings:
    """As if the rows that pad the vocabulary were tokens."""
    return exact_settings(config, mesh)._replace(vocab_size=config.model.vocab_rows)


NUMERICAL = {
    "1 erf gelu": (
        in_place_of("gated_gelu", lambda gate, up: jax.nn.gelu(gate, approximate=False) * up, layers),
        parity.check_layers,
    ),
    "2 norm without 1 + scale": (
        in_place_of("rms_norm", norm_without_one, layers, transformer),
        parity.check_layers,
    ),
    "2 norm cast before the scale": (
        in_place_of("rms_norm", norm_cast_before_the_scale, ops),
        parity.check_norm_in_bfloat16,
    ),
    "3 factor of the embedding not rounded": (
        in_place_of("embed", embedding_without_rounded_factor, Transformer),
        parity.check_bfloat16,
    ),
    "3 no factor of the embedding": (
        in_place_of("embed", embedding_without_factor, Transformer),
        parity.check_layers,
    ),
    "4 angles in bfloat16": (in_place_of("rope", rope_of_rounded_angles, layers), parity.check_bfloat16),
    "4 angles in bfloat16, float32 model": (
        in_place_of("rope", rope_of_rounded_angles, layers),
        parity.check_far_positions,
    ),
    "4 interleaved halves": (in_place_of("rope", interleaved_rope, layers), parity.check_layers),
    "5 queries scaled by width / heads": (
        in_place_of("causal_attend", scaled_by_width, attention),
        parity.check_layers,
    ),
    "5 softmax in bfloat16": (
        in_place_of("attend", attend_with_rounded_softmax, attention),
        parity.check_layers,
    ),
    "6 logits in bfloat16": (set_rounded_logits, parity.check_layers),
    "8 padding rows in the loss": (
        in_place_of("loss_settings", settings_of_all_rows, step),
        parity.check_training,
    ),
}


@pytest.mark.parametrize("trap", NUMERICAL)
def test_a_numerical_trap_is_caught(case: parity.Case, trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_trap, check = NUMERICAL[trap]
    set_trap(monkeypatch)
    with pytest.raises(AssertionError):
        check(case)


def check_padding_rows_are_never_sampled(case: parity.Case) -> None:
    """With rows that would win every time: the published Flax form has 128 of them."""
    gemma = case.gemma()
    arrays = named_arrays(gemma.params)
    vocab_size = gemma.config.vocab_size
    assert arrays["embedding"].shape[0] > vocab_size
    arrays["embedding"] = arrays["embedding"].at[vocab_size:].set(10 * arrays["embedding"][30])
    padded = Gemma(gemma.config, with_arrays(gemma.params, arrays), None, gemma.mesh, gemma.compute)
    for temperature in (0.0, 5.0):
        settings = {"max_new_tokens": make.NEW, "temperature": temperature}
        for generation in padded.generate(make.PROMPTS, **settings):
            assert max(generation.token_ids, default=0) < vocab_size


def test_padding_rows_are_never_sampled(case: parity.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_padding_rows_are_never_sampled(case)
    monkeypatch.setattr(transformer, "mask_padding_rows", unmasked)
    with pytest.raises(AssertionError):
        check_padding_rows_are_never_sampled(case)


def check_every_sequence_has_one_bos(gemma: Gemma) -> None:
    """What the model is given: a prompt, a dialogue, and each document of a packed row."""
    tokenizer, bos = gemma.tokenizer, gemma.tokenizer.bos_id
    text = "1 and 2"
    batch = packing.empty_rows(1, 64, tokenizer.pad_id)
    bodies = [np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)] * 2
    packing.fill_row(batch, 0, bodies, bos)
    documents = [batch.tokens[0][batch.segment_ids[0] == segment].tolist() for segment in (1, 2)]
    dialogue = encode_dialogue(tokenizer, [{"role": "user", "content": text}], answer=True)
    for ids in (gemma._prompt_ids(text), dialogue, *documents):
        assert ids.count(bos) == 1 and ids[0] == bos
        assert tokenizer.decode(ids).count(text) == 1


@pytest.mark.parametrize(
    ("trap", "place"),
    [("missing", "prompt"), ("doubled", "prompt"), ("doubled", "text")]
    + [("missing", "document"), ("doubled", "document")],
)
def test_a_missing_or_doubled_bos_is_caught(
    trap: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parity.published.write_huggingface(
        tmp_path / "model",
        parity.published.MULTI_QUERY | {"vocab_size": 387},
        parity.published.random_tensors(parity.published.MULTI_QUERY | {"vocab_size": 387}),
    )
    Tokenizer.train([f"{a} and {b}\n" for a in range(60) for b in range(60)], 387, folder / "tokenizer.model")
    gemma = Gemma.from_pretrained(folder, mesh=MeshConfig(cpu_devices=1))
    check_every_sequence_has_one_bos(gemma)

    def wrong(ids: list[int]) -> list[int]:
        return ids[1:] if trap == "missing" else [gemma.tokenizer.bos_id, *ids]

    if place == "prompt":
        right = gemma._prompt_ids
        monkeypatch.setattr(gemma, "_prompt_ids", lambda text: wrong(right(text)))
    elif place == "text":
        encode = Tokenizer.encode_typed
        monkeypatch.setattr(Tokenizer, "encode_typed", lambda self, text: wrong(encode(self, text)))
    else:
        fill = packing.fill_row

        def fill_wrongly(batch: packing.Batch, row: int, pieces: list[np.ndarray], bos_id: int) -> None:
            if trap == "doubled":
                pieces = [np.concatenate([[bos_id], piece]) for piece in pieces]
            fill(batch, row, pieces, bos_id if trap == "doubled" else int(pieces[0][0]))

        monkeypatch.setattr(packing, "fill_row", fill_wrongly)
    with pytest.raises(AssertionError):
        check_every_sequence_has_one_bos(gemma)
