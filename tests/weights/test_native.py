"""Products of few rows in C++: equal to plain ones, used where they should be, and not needed."""

import dataclasses
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.config import PRESETS, ComputeConfig, replace
from gemma_jax.model import ModelSpec
from gemma_jax.sampling.decode import Said, begin, decode, prefill
from gemma_jax.sampling.requests import Widths, slot_settings
from gemma_jax.testing import cpu_mesh
from gemma_jax.weights import Context, Kind, kind_of, native
from tests.weights.kinds import adapters, with_random_adapters

CONFIG = replace(PRESETS["gemma_tiny"], {"num_kv_heads": 1})
ROWS = (1, 5, 18)
# Columns in vectors, beside them, of several strips, and odd; contracted axes cut into parts, and not.
SHAPES = ((5, 7), (66, 202), (2050, 2130))
RNG = np.random.default_rng(0)


@pytest.fixture(params=["vectors", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions with vector instructions, and those without."""
    if request.param == "vectors" and native.kernels().name != "avx2":
        pytest.skip("this machine has no AVX2")
    flags = native.vector_flags() if request.param == "vectors" else ()
    native.register(native.compiled(flags), request.param)
    monkeypatch.setattr(native, "PREFIX", request.param)


def error(found: Any, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def activations(rows: int, size: int) -> np.ndarray:
    """Random numbers of which some rows are a thousand times larger, and one is zero."""
    x = RNG.normal(size=(rows, size)) * 10.0 ** RNG.integers(-2, 2, (rows, 1))
    x[rows // 2 :: 7] = 0 if rows > 2 else 1
    return x.astype(np.float32)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_products_equal_plain_ones(dtype: str, shape: tuple[int, int]) -> None:
    w = jnp.asarray(RNG.normal(size=(3, *shape)) * 10.0 ** RNG.integers(-6, 3, shape), dtype)
    for rows in ROWS:
        x = activations(rows, shape[0])
        of_layer = np.asarray(w[2], np.float64)
        assert error(native.matmul(x, w, jnp.int32(2)), x @ of_layer) < 2e-6
        assert error(native.unembed(x, w[2].T), x @ of_layer) < 2e-6


def rounded(x: np.ndarray, part: int, largest: int) -> np.ndarray:
    """Activations rounded to integers, with one scale for each part of a row."""
    parts = np.pad(x, ((0, 0), (0, -x.shape[1] % part))).reshape(len(x), -1, part)
    absmax = np.abs(parts).max(2, keepdims=True)
    factor = np.divide(np.float32(largest), absmax, where=absmax > 0, out=np.zeros_like(absmax))
    whole = np.rint(parts * factor) * (absmax / np.float32(largest)).astype(np.float64)
    return whole.reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("dtype", "largest", "part"), [("int8", 32767, 256), ("int4", 127, 32)])
@pytest.mark.parametrize("blocks", [(64, 3), (20, 5), (1, 1030)], ids=str)
def test_integer_products_are_those_of_rounded_activations(
    dtype: str, largest: int, part: int, blocks: tuple[int, int]
) -> None:
    K, G = blocks
    lowest = -128 if dtype == "int8" else -8
    for outputs, rows in ((130, 16), (131, 3), (2114, 1)):
        codes = RNG.integers(lowest, -lowest, (2, K, G, outputs))
        scale = jnp.asarray(
            RNG.uniform(0.5, 1, (2, 1 if K == 1 else G, outputs)), "float32" if K == 1 else "bfloat16"
        )
        x = activations(rows, K * G)
        found = native.integer_matmul(x, jnp.asarray(codes, dtype), scale, jnp.int32(1))
        dense = (codes[1] * np.asarray(scale[1], np.float64)).swapaxes(0, 1).reshape(K * G, outputs)
        if found is None:
            assert dtype == "int4" and K * G * outputs % 2
            continue
        part_of_block = part if K == 1 else np.gcd(part, K)
        assert error(found, rounded(x, part_of_block, largest) @ dense) < 2e-6
        assert error(found, x @ dense) < (1e-4 if dtype == "int8" else 0.02)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("size", [6, 2064])
def test_logits_of_an_int8_table(size: int) -> None:
    codes = RNG.integers(-128, 128, (301, size)).astype(np.int8)
    scale = RNG.uniform(0.5, 1, (301, 1)).astype(np.float32)
    for rows in ROWS:
        x = activations(rows, size)
        expected = rounded(x, 1024, 32767) @ codes.T.astype(np.float64) * scale[:, 0]
        assert error(native.integer_unembed(x, codes, scale), expected) < 2e-6


@pytest.mark.usefixtures("library")
def test_a_number_that_is_not_finite_spreads() -> None:
    """Rounding must not turn activations that are NaN or infinite into finite results."""
    codes, scale = jnp.ones((1, 1, 70, 66), jnp.int8), jnp.ones((1, 1, 66))
    for bad in (np.nan, np.inf):
        x = np.ones((2, 70), np.float32)
        x[1, 68] = bad
        for dtype in (jnp.int8, jnp.int4):
            found = native.integer_matmul(x, codes.astype(dtype), scale, jnp.int32(0))
            assert not np.isfinite(found[1]).any() and np.isfinite(found[0]).all()
        assert not np.isfinite(native.matmul(x, jnp.ones((1, 70, 66)), jnp.int32(0))[1]).any()


def model_of(kind: Kind, dtype: str = "float32") -> tuple[ModelSpec, Any]:
    spec = ModelSpec(CONFIG, ComputeConfig(param_dtype=dtype), cpu_mesh(1), kind)
    return spec, with_random_adapters(spec.init(0), 1)


KINDS = {
    "float32": (kind_of(""), "float32", 1e-5),
    "bfloat16": (kind_of(""), "bfloat16", 1e-5),
    "int8": (kind_of("int8"), "float32", 2e-4),
    "int4": (kind_of("int4"), "float32", 0.03),
    "adapters": (adapters(count=2), "float32", 2e-4),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, 17, native.MOST_ROWS + 1])
def test_every_layer_is_multiplied_as_by_xla(name: str, rows: int) -> None:
    """Stacked weights and the number of a layer give what the weight of that layer gives."""
    kind, dtype, most = KINDS[name]
    spec, params = model_of(kind, dtype)
    chosen = Context(adapters=jnp.asarray(np.arange(rows) % 3 - 1)) if name == "adapters" else Context()

    @jax.jit
    def products(params: Any, x: Any, layer: Any) -> list[tuple[jax.Array, jax.Array]]:
        whole = spec.merge(params)
        alone = spec.merge(
            jax.tree.map(lambda a: a[layer] if a.ndim and len(a) == CONFIG.num_layers else a, params)
        )
        found = []
        for block, context in (
            (whole.blocks, dataclasses.replace(chosen, layer=layer)),
            (alone.blocks, chosen),
        ):
            hidden = block.feed_forward(x, context)
            heads = [block.attention.q.matmul(x, context), block.attention.v.matmul(x, context)]
            found.append([hidden, *heads, block.attention.o.matmul(heads[0], context)])
        return found

    x = jnp.asarray(activations(rows, CONFIG.embed_dim)[:, None])
    for layer in range(CONFIG.num_layers):
        for actual, expected in zip(*products(params, x, jnp.int32(layer)), strict=True):
            assert error(actual, np.asarray(expected, np.float64)) < most
    calls = products.lower(params, x, jnp.int32(0)).as_text().count("custom_call @gemma_")
    assert calls == (6 if rows <= native.MOST_ROWS else 0)


def test_sampling_uses_them_wherever_there_is_a_compiler() -> None:
    """All matmuls of a step and the logits; without this nobody would notice that sampling became slow."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("there is no C++ compiler")
    assert native.kernels().name in ("avx2", "plain")
    spec, params = model_of(kind_of("int4"))
    settings = slot_settings([], 2, Widths(), CONFIG.context_length)

    def steps(params: Any, tokens: Any) -> Any:
        model = spec.merge(params)
        prompts = prefill(model, tokens, 0, jnp.array([3, 2]), settings.adapters, size=16)
        slots, _ = begin(model, prompts, settings, Said())
        return decode(model, slots, jnp.int32(4))

    lowered = jax.jit(steps).lower(params, jnp.ones((2, 4), jnp.int32))
    found = re.findall(r"custom_call @gemma_(\w+)", lowered.as_text())
    assert sorted(set(found)) == ["integer_table", "integers"]
    assert (found.count("integers"), found.count("integer_table")) == (14, 2)


def test_without_a_compiler_or_a_cache_the_reason_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(native, "_FOLDER", tmp_path / "file" / "native")
    assert "file" in native.kernels.__wrapped__().reason
    monkeypatch.setattr(native, "_FOLDER", tmp_path / "native")
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'native.cc:1: error: no such thing' >&2\nexit 1\n")
    failing.chmod(0o755)
    for compiler, reason in (("/no/compiler", "/no/compiler"), (str(failing), "no such thing")):
        monkeypatch.setenv("CXX", compiler)
        kernels = native.kernels.__wrapped__()
        assert kernels.name == "xla" and reason in str(kernels)


def test_several_processes_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None sees a library that another has not finished, and only libraries remain."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nfor last; do :; done\nfor i in 1 2 3; do echo $i >> $last; sleep 0.1; done\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(native, "_FOLDER", tmp_path / "native")
    contents = []
    threads = [
        threading.Thread(target=lambda: contents.append(native.compiled([]).read_text())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == ["1\n2\n3\n"] * 4
    assert len(os.listdir(tmp_path / "native")) == 1
