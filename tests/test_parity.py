"""The same numbers as transformers computes, for small random Gemmas.

The golden files come from tests/golden/make.py. `make parity` runs these tests with transformers at hand
too: then it computes everything anew, and makes and saves further models of its own.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax import Gemma, verification
from gemma_jax.config import ComputeConfig, MeshConfig, OptimizerConfig, PretrainConfig
from gemma_jax.data.packing import Batch
from gemma_jax.model import ModelSpec, ops
from gemma_jax.pretrained.huggingface import tensor_name, to_stored
from gemma_jax.sharding import named_arrays, with_arrays
from gemma_jax.testing import cpu_mesh, relative_difference
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import create_train_state
from gemma_jax.training.step import make_train_step, sums_and_gradients
from tests.golden import make
from tests.pretrained import published

LIVE = bool(os.environ.get("GEMMA_JAX_PARITY"))
FLOAT32 = ComputeConfig()
BFLOAT16 = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")
EMBEDDING = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Case:
    """A Hugging Face directory and what transformers computes with it."""

    folder: Path
    values: dict[str, np.ndarray]

    def gemma(self, compute: ComputeConfig = FLOAT32) -> Gemma:
        return Gemma.from_pretrained(self.folder, mesh=MeshConfig(cpu_devices=1), compute=compute)

    def layers(self, compute: ComputeConfig = FLOAT32, position: int = 0) -> dict[str, np.ndarray]:
        gemma = self.gemma(compute)
        rows = make.tokens(gemma.config.vocab_size)[:, :-1]
        spec = ModelSpec(gemma.config, compute, gemma.mesh)
        return verification.layer_outputs(spec, gemma.params, rows, position)


def golden_case(name: str, folder: Path) -> Case:
    """A case of the golden files, its weights made here from their seed."""
    published.write_huggingface(folder, make.CASES[name], make.tensors(name), shards=3)
    with np.load(make.FOLDER / f"{name}.npz") as file:
        return Case(folder, dict(file))


def live_case(name: str, dtype: str, folder: Path) -> Case:
    """A model that transformers makes and saves in shards."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(7)
    model = GemmaForCausalLM(GemmaConfig(**make.CASES[name] | {"initializer_range": 0.3}))
    for parameter, value in model.named_parameters():
        if "norm" in parameter:
            torch.nn.init.normal_(value, std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    weights = {
        key: value.float().numpy() for key, value in model.state_dict().items() if "lm_head" not in key
    }
    return Case(folder, make.reference(make.CASES[name], weights))


NAMES = [*make.CASES, "live multi_query float32", "live multi_head bfloat16"]


@pytest.fixture(scope="module", params=NAMES if LIVE else list(make.CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("huggingface")
    kind, *rest = request.param.split()
    return live_case(*rest, folder) if kind == "live" else golden_case(request.param, folder)


def test_every_layer_is_within_1e_4(case: Case) -> None:
    ours = case.layers()
    assert len(ours) > 4
    for name, value in ours.items():
        np.testing.assert_allclose(value, case.values[name], atol=1e-4, rtol=0, err_msg=name)


def test_far_positions(case: Case) -> None:
    """Where bfloat16 could not tell one position from the next."""
    ours = case.layers(position=make.FAR)
    assert relative_difference(ours["logits"], case.values["far_logits"]) < 1e-5


def test_bfloat16_is_as_exact_as_the_reference(case: Case) -> None:
    """As near to exact as the reference itself is, at far positions; rounded where it rounds."""
    ours, values = case.layers(BFLOAT16, make.FAR), case.values
    np.testing.assert_array_equal(ours["embeddings"], values["bfloat16_embeddings"])
    own_error = relative_difference(values["bfloat16_logits"], values["rounded_logits"])
    assert relative_difference(ours["logits"], values["rounded_logits"]) <= own_error


def test_norm_in_bfloat16(case: Case) -> None:
    """The first norm, from the same numbers: bit for bit, but for a sum of squares in another order."""
    gemma = case.gemma(BFLOAT16)
    x = jnp.asarray(case.values["bfloat16_embeddings"], jnp.bfloat16)
    scale = named_arrays(gemma.params)["blocks.attention_norm"][0]
    ours = np.asarray(ops.rms_norm(x, scale, gemma.config.norm_epsilon), np.float32)
    assert np.mean(ours != case.values["bfloat16_first_norm"]) < 0.01


def training_parts(case: Case) -> tuple[PretrainConfig, nnx.State, Batch]:
    gemma = case.gemma()
    config = PretrainConfig(
        steps=make.STEPS,
        model=gemma.config,
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0, **make.ADAMW),
        mesh=MeshConfig(cpu_devices=1),
    )
    rows = make.tokens(gemma.config.vocab_size).astype(np.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=np.ones(tokens.shape, np.float32),
        positions=positions,
        segment_ids=np.ones_like(tokens),
    )
    return config, gemma.params, batch


def test_loss_gradients_and_steps_of_adamw(case: Case) -> None:
    config, params, batch = training_parts(case)
    recipe = pretraining(config, cpu_mesh(1))
    _, sums, gradients = jax.jit(sums_and_gradients(recipe))(params, batch)
    assert float(sums["loss"].mean) == pytest.approx(case.values["losses"][0], rel=1e-5)
    compared = set()
    for parameter, stacked in named_arrays(gradients).items():
        layers = range(config.model.num_layers) if parameter.startswith("blocks.") else [None]
        for layer in layers:
            name = tensor_name(parameter, layer)
            ours = np.asarray(stacked if layer is None else stacked[layer])
            if name == EMBEDDING:
                assert not ours[config.model.vocab_size :].any(), "a padding row has a gradient"
                ours = ours[: config.model.vocab_size]
            expected = case.values[f"gradient/{name}"]
            assert relative_difference(to_stored(parameter, ours), expected) < 1e-4, name
            compared.add(f"gradient/{name}")
    assert compared == {name for name in case.values if name.startswith("gradient/")}

    state = create_train_state(recipe, params)
    step, losses = make_train_step(recipe), []
    for _ in range(make.STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, case.values["losses"], rtol=1e-5)


def test_greedy_from_a_batch_and_from_single_prompts(case: Case) -> None:
    gemma = case.gemma()
    expected = [row[: np.argmax(row == 1)] if 1 in row else row for row in case.values["greedy"]]
    as_batch = gemma.generate(make.PROMPTS, max_new_tokens=make.NEW)
    for prompt, in_batch, wanted in zip(make.PROMPTS, as_batch, expected, strict=True):
        [alone] = gemma.generate([prompt], max_new_tokens=make.NEW)
        assert in_batch.token_ids == alone.token_ids == wanted.tolist()
        assert in_batch.finish_reason == ("stop" if len(wanted) < make.NEW else "length")


def test_padding_rows_are_never_sampled(case: Case) -> None:
    """With rows that would win every time: the published Flax form has 128 of them."""
    gemma = case.gemma()
    arrays = named_arrays(gemma.params)
    vocab_size = gemma.config.vocab_size
    assert arrays["embedding"].shape[0] > vocab_size
    arrays["embedding"] = arrays["embedding"].at[vocab_size:].set(10 * arrays["embedding"][30])
    padded = Gemma(gemma.spec, with_arrays(gemma.params, arrays), None)
    for temperature in (0.0, 5.0):
        for generation in padded.generate(make.PROMPTS, max_new_tokens=make.NEW, temperature=temperature):
            assert max(generation.token_ids, default=0) < vocab_size


def test_the_layers_one_by_one_are_those_of_the_model(case: Case) -> None:
    gemma = case.gemma()
    rows = make.tokens(gemma.config.vocab_size)[:, :-1]
    assert relative_difference(case.layers()["logits"], gemma.logits(rows)) < 1e-5


@pytest.mark.skipif(not LIVE, reason="`make parity` computes the golden files anew")
@pytest.mark.parametrize("name", make.CASES)
def test_golden_files_are_what_transformers_computes(name: str) -> None:
    assert importlib.util.find_spec("transformers"), "make parity installs transformers"
    computed: dict[str, Any] = make.reference(make.CASES[name], make.tensors(name))
    with np.load(make.FOLDER / f"{name}.npz") as file:
        assert set(file) == set(computed)
        for key, value in computed.items():
            np.testing.assert_allclose(file[key], value, atol=1e-5, rtol=1e-4, err_msg=key)
