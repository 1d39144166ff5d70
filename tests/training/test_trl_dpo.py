"""Losses, metrics and gradients of adapters are those of TRL: DPO and supervised fine-tuning.

The golden file comes from tests/golden/make_trl.py. `make parity` runs these tests with TRL at hand too.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.config import (
    ComputeConfig,
    ExampleDataConfig,
    FinetuneConfig,
    LoraConfig,
    PreferenceConfig,
    TransformerConfig,
)
from gemma_jax.data.packing import Batch, empty_rows, fill_row
from gemma_jax.pretrained.adapted import base_spec, begin_adapters
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.pretrained.huggingface import tensor_name
from gemma_jax.sharding import named_arrays, put_batch, with_arrays
from gemma_jax.testing import assert_same, cpu_mesh
from gemma_jax.training.finetuning import finetuning
from gemma_jax.training.step import sums_and_gradients
from gemma_jax.weights import Dense, parameter_table
from tests.golden import make, make_trl
from tests.pretrained.published import Tensors, write_huggingface

LIVE = pytest.mark.skipif(not os.environ.get("GEMMA_JAX_PARITY"), reason="`make parity` installs TRL")
LENGTH = 48


def our_arrays(tensors: Tensors, config: TransformerConfig, prefix: str = "") -> dict[str, np.ndarray]:
    """Matrices with PEFT's names and shapes as our stacked arrays: "blocks.attention.q.a" and so on."""
    made = {}
    for name, about in parameter_table(config).items():
        if not about.inputs:
            continue
        modules = [tensor_name(name, layer).removesuffix(".weight") for layer in range(about.layers)]
        a = np.stack([tensors[f"{module}.lora_A"].T for module in modules])
        b = np.stack([tensors[f"{module}.lora_B"].T for module in modules])
        inward, outward = about.shape[: about.inputs], about.shape[about.inputs :]
        made[f"{name}.{prefix}a"] = a.reshape(about.layers, 1, *inward, make_trl.RANK)
        made[f"{name}.{prefix}b"] = b.reshape(about.layers, 1, make_trl.RANK, *outward)
    return made


def one_row(answers: int) -> Batch:
    """The examples of all pairs in one row, each prompt with its first answers; only these are trained."""
    batch, bodies, weights = empty_rows(1, LENGTH, make_trl.PAD), [], []
    for prompt, *found in make_trl.PAIRS:
        for answer in found[:answers]:
            bodies.append(np.array(prompt[1:] + answer))
            weights.append(np.repeat([0, 1], [len(prompt) - 1, len(answer)]))
    fill_row(batch, 0, bodies, make_trl.BOS, weights)
    return batch


def ours(folder: Path, sizes: dict[str, Any], weights: Tensors, case: str) -> dict[str, Any]:
    """What our objective computes with the same weights, adapters and answers: means and gradients."""
    objective, beta, smoothing, _ = make_trl.CASES[case]
    base = open_checkpoint(write_huggingface(folder, sizes, weights))
    config = FinetuneConfig(
        model=base.config,
        objective=objective,
        dpo=PreferenceConfig(beta or 0.1, smoothing),
        data=ExampleDataConfig(sequence_length=LENGTH, batch_size=1),
        lora=LoraConfig(rank=make_trl.RANK, alpha=make_trl.ALPHA),
        compute=ComputeConfig(loss_block=16),
    )
    batch = one_row(2 if objective == "dpo" else 1)
    segments, trained = int(batch.segment_ids.max()), int(np.sum(batch.loss_weights > 0))
    recipe = finetuning(config, cpu_mesh(1), Dense, trained, segments)
    adapter, reference = make_trl.adapters(weights, case)
    arrays = our_arrays(adapter, base.config)
    if objective == "dpo":
        arrays |= our_arrays(reference, base.config, "reference_")
    params = named_arrays(begin_adapters(recipe.model, base.params(base_spec(recipe.model)), 0, None))
    assert {name for name in params if name.endswith((".a", ".b", "_a", "_b"))} == arrays.keys()
    params |= {name: jnp.asarray(x) for name, x in arrays.items()}
    _, sums, gradients = jax.jit(sums_and_gradients(recipe))(
        with_arrays(recipe.model.params, params), put_batch(batch, 1, recipe.model.mesh)
    )
    return {name: x.mean for name, x in sums.items()} | named_arrays(gradients)


def check(folder: Path, sizes: dict[str, Any], weights: Tensors, case: str, theirs: Tensors) -> None:
    """Compares all that TRL computed with ours."""
    found = ours(folder, sizes, weights, case)
    config = open_checkpoint(folder).config
    start = "gradient/"
    gradients = {name.removeprefix(start): x for name, x in theirs.items() if name.startswith(start)}
    expected = {name: x for name, x in theirs.items() if not name.startswith(start)}
    expected |= our_arrays(gradients, config)
    assert expected.keys() == found.keys() - {"tokens"}
    assert all(np.any(x) for name, x in expected.items() if not name.startswith("rewards/acc"))
    assert_same({name: found[name] for name in expected}, expected, 1e-4)


@pytest.mark.parametrize("case", make_trl.CASES)
def test_as_the_golden_file(tmp_path: Path, case: str) -> None:
    with np.load(make.FOLDER / "trl.npz") as file:
        theirs = {name.removeprefix(f"{case}/"): file[name] for name in file if name.startswith(f"{case}/")}
    check(tmp_path, make.CASES["multi_query"], make.tensors("multi_query"), case, theirs)


@LIVE
@pytest.mark.parametrize("case", make_trl.CASES)
def test_as_trl(tmp_path: Path, case: str) -> None:
    sizes, weights = make.CASES["multi_head"], make.tensors("multi_head")
    check(tmp_path, sizes, weights, case, make_trl.computed(sizes, weights, case))


@LIVE
def test_the_golden_file_is_what_trl_computes() -> None:
    computed = make_trl.golden()
    with np.load(make.FOLDER / "trl.npz") as file:
        assert set(file) == set(computed)
        for name, x in computed.items():
            np.testing.assert_allclose(file[name], x, atol=1e-5, rtol=1e-4, err_msg=name)
