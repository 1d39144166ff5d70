"""Floating-point operations counted and compared with what XLA counts, and the table of devices."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gemma_jax.config import PRESETS, ComputeConfig, PretrainConfig, TransformerConfig
from gemma_jax.data.packing import Batch
from gemma_jax.model import ModelSpec
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.hardware import peak_flops, peak_memory, training_flops_a_token
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.step import sums_and_gradients


def test_operations_of_gemma_2b_by_hand() -> None:
    attention_weights = 2048 * (8 + 1 + 1 + 8) * 256  # q, k, v, o
    feed_forward_weights = 3 * 2048 * 16_384
    weights = 18 * (attention_weights + feed_forward_weights) + 256_000 * 2048
    assert weights == 2_506_096_640  # the published 2,506,172,416 without 37 norms of 2048
    # A token sees half of the row: 8 heads of 256, scores and values, 2 operations each.
    attention = 18 * 2 * 2 * 8 * 256 * 8192 / 2
    assert training_flops_a_token(PRESETS["gemma_2b"], 8192) == 6 * weights + 3 * attention


def test_operations_are_those_that_xla_counts() -> None:
    """In a compiled program without loops, whose bodies XLA would count once."""
    model = TransformerConfig(
        vocab_size=1024,
        num_layers=2,
        embed_dim=256,
        hidden_dim=1024,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        context_length=512,
    )
    B, L = 2, 512
    compute = ComputeConfig(scan_unroll=2, loss_block=L)
    config, mesh = PretrainConfig(model=model, compute=compute), cpu_mesh(1)
    kinds = (np.int32, np.int32, np.float32, np.int32, np.int32)
    batch = Batch(*(jax.ShapeDtypeStruct((B, L), kind) for kind in kinds))
    params = jax.eval_shape(lambda: ModelSpec(model, compute, mesh).init(0))
    run = jax.jit(sums_and_gradients(pretraining(config, mesh)))
    counted = run.lower(params, batch).compile().cost_analysis()
    # Queries go in blocks of 128 against the keys up to the block's end: 64 keys too many on average.
    needed = B * L * training_flops_a_token(model, L + 128)
    # Norms, softmax and gelu are the rest; they grow with the widths, not with their products.
    assert needed < counted["flops"] < 1.05 * needed


@pytest.mark.parametrize(
    ("kind", "cores", "teraflops"),
    [
        ("TPU v4", 2, 275),
        ("TPU v5 lite", 1, 197),
        ("TPU v6 lite", 1, 918),
        ("NVIDIA A100-SXM4-80GB", None, 312),
        ("NVIDIA H100 80GB HBM3", None, 989),
    ],
)
def test_peaks_of_devices_as_jax_names_them(kind: str, cores: int | None, teraflops: float | None) -> None:
    device = SimpleNamespace(device_kind=kind, **({"num_cores": cores} if cores else {}))
    expected = None if teraflops is None else pytest.approx(4e12 * teraflops)
    assert peak_flops([device] * 4) == expected
    assert peak_flops([device, SimpleNamespace(device_kind="unheard of")]) is None


def test_memory_of_the_process_where_devices_tell_nothing() -> None:
    before = peak_memory()
    held = np.ones(32 * 2**20)  # 256 MB that are written to, more than was ever freed before
    held[::512] += 1
    assert peak_memory() >= before
    assert peak_memory() > held.nbytes
