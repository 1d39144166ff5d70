"""Adapters in PEFT's files: read as PEFT reads them, refused where that is not supported, and written for it.

`make parity` compares them with PEFT itself.
"""

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.config import ComputeConfig, MeshConfig, TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained import peft
from gemma_jax.pretrained.adapted import with_adapters
from gemma_jax.pretrained.adapters import Adapter, MergedWeights, stacked
from gemma_jax.pretrained.checkpoint import is_adapter, open_checkpoint
from gemma_jax.pretrained.huggingface import HuggingFaceDirectory
from gemma_jax.pretrained.layout import in_order
from gemma_jax.pretrained.peft import read_peft, write_peft
from gemma_jax.testing import cpu_mesh, relative_difference
from tests.messages import naming
from tests.pretrained.damage import damaged
from tests.pretrained.published import (
    MULTI_HEAD,
    MULTI_QUERY,
    random_tensors,
    safetensors_bytes,
    write_huggingface,
)
from tests.pretrained.test_safetensors import change_text

LIVE = pytest.mark.skipif(not os.environ.get("GEMMA_JAX_PARITY"), reason="`make parity` installs PEFT")
PREFIX = "base_model.model."
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
TOKENS = np.random.default_rng(0).integers(4, 500, (2, 12))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Files = dict[str, np.ndarray]


def modules(*layers: int, of: tuple[str, ...] = ("q_proj", "v_proj")) -> list[str]:
    return [
        f"model.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
        for i in layers
        for name in of
    ]


def tensors_of(ranks: dict[str, int], base: Files, rows: int = 0, dtype: Any = np.float32) -> Files:
    """Random tensors of an adapter for modules of the given ranks."""
    rng, made = np.random.default_rng(1), {}
    for name, rank in ranks.items():
        outputs, inputs = base[f"{name}.weight"].shape
        made[f"{PREFIX}{name}.lora_A.weight"] = rng.normal(size=(rank, inputs)) / 5
        made[f"{PREFIX}{name}.lora_B.weight"] = rng.normal(size=(outputs, rank)) / 5
    if rows:
        made[ROWS] = rng.normal(size=(rows, base["model.embed_tokens.weight"].shape[1])) / 5
    return {name: array.astype(dtype) for name, array in made.items()}


def write(folder: Path, settings: dict[str, Any], tensors: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)  # it may be mapped
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceDirectory:
    """A multi-query model of two layers."""
    return HuggingFaceDirectory(
        write_huggingface(tmp_path_factory.mktemp("base"), MULTI_QUERY, random_tensors(MULTI_QUERY))
    )


def merged_by_hand(base: Files, tensors: Files, scales: dict[str, float], tokens: list[int]) -> Files:
    """The tensors of the model with the adapter merged, as its authors define it: W + scale B A."""
    made = dict(base)
    for name, scale in scales.items():
        a, b = (tensors[f"{PREFIX}{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        made[f"{name}.weight"] = (base[f"{name}.weight"] + scale * b @ a).astype(np.float32)
    made["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].copy()
    if tokens:
        made["model.embed_tokens.weight"][tokens] = tensors[ROWS]
    return made


def adapted(folder: Path, adapter: Adapter) -> tuple[ModelSpec, Any]:
    """The model in `folder`, with the adapter beside its weights."""
    found = open_checkpoint(folder)
    spec = ModelSpec(found.config, ComputeConfig(), cpu_mesh(1))
    return with_adapters(spec, found.params(spec), [adapter])


@pytest.mark.parametrize("sizes", [MULTI_QUERY, MULTI_HEAD], ids=["multi-query", "multi-head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_computes_what_its_files_say(tmp_path: Path, sizes: dict[str, Any], dtype: str) -> None:
    """Merged and unmerged, for all projections, different ranks and scales, and rows of the embedding."""
    weights = random_tensors(sizes)
    names = modules(0, of=ALL) + modules(1, of=ALL)
    ranks = dict.fromkeys(names, 4) | {names[3]: 2, names[6]: 7}
    scales = dict.fromkeys(names, 16 / 4) | {names[3]: 16 / 2, names[6]: 3 / 7}
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": [*ALL],
        "layers_to_transform": [0, 1],
        "rank_pattern": {"layers.0.self_attn.o_proj": 2, "^model.*0.mlp.down_proj": 7},
        "alpha_pattern": {"layers.0.mlp.down_proj": 3},
        "trainable_token_indices": [9, 3],
    }
    tensors = tensors_of(ranks, weights, 2, np.dtype(jnp.dtype(dtype)))
    folder = write(tmp_path / "adapter", settings, tensors)
    write_huggingface(tmp_path / "base", sizes, weights)
    write_huggingface(tmp_path / "merged", sizes, merged_by_hand(weights, tensors, scales, [9, 3]))
    there = HuggingFaceDirectory(tmp_path / "base")
    adapter = read_peft(folder, there.config)
    merged, wanted = MergedWeights(there, adapter), HuggingFaceDirectory(tmp_path / "merged")
    for place in in_order(there.config):
        np.testing.assert_allclose(merged.get(*place), wanted.get(*place), rtol=1e-5, atol=1e-5)
    spec, params = adapted(tmp_path / "base", adapter)
    logits = Gemma.from_pretrained(tmp_path / "merged", mesh=MeshConfig(cpu_devices=1)).logits(TOKENS)
    assert relative_difference(Gemma(spec, params, None, adapters=[""]).logits(TOKENS), logits) < 1e-5
    # There and back.
    assert is_adapter(folder) and not is_adapter(tmp_path)
    (tmp_path / "again").mkdir()
    write_peft(tmp_path / "again", adapter, there.config)
    again = read_peft(tmp_path / "again", there.config)
    assert again.pairs.keys() == adapter.pairs.keys() and [*again.rows] == [3, 9]
    for key, pair in adapter.pairs.items():
        assert again.pairs[key].scale == pytest.approx(pair.scale, rel=1e-12)
        np.testing.assert_array_equal(again.pairs[key].a, pair.a)
        np.testing.assert_array_equal(again.pairs[key].b, pair.b)
    for token, row in adapter.rows.items():
        np.testing.assert_array_equal(again.rows[token], row)


Ranks = dict[str, tuple[int, float]]  # rank and scale of each module
R8 = (8, 1.0)
Q, V = modules(0, 1, of=("q_proj",)), modules(0, 1, of=("v_proj",))
UP = "model.layers.1.mlp.up_proj"
CONFIGS: dict[str, tuple[dict[str, Any], Ranks]] = {
    "defaults": ({}, dict.fromkeys(Q + V, R8)),
    "null": ({"r": None, "lora_alpha": None, "target_modules": None}, dict.fromkeys(Q + V, R8)),
    "no effect": (
        {"lora_dropout": 0.1, "peft_version": "9", "init_lora_weights": "eva", "new": False, "newer": None},
        dict.fromkeys(Q + V, R8),
    ),
    "rslora": ({"use_rslora": True, "r": 4, "lora_alpha": 6}, dict.fromkeys(Q + V, (4, 3.0))),
    "suffixes": ({"target_modules": ["layers.1.self_attn.q_proj", "proj"]}, {Q[1]: R8}),
    "all-linear": ({"target_modules": "All-Linear"}, dict.fromkeys(modules(0, 1, of=ALL), R8)),
    "full match": ({"target_modules": r".*\.1\.(self_attn\.q|mlp.up)_proj"}, dict.fromkeys([Q[1], UP], R8)),
    "part of a name": ({"target_modules": "q_proj|.*v_proj|model.layers"}, dict.fromkeys(V, R8)),
    "excluded": ({"exclude_modules": ["self_attn.v_proj", "layers.0.self_attn.q_proj"]}, {Q[1]: R8}),
    "excluded by pattern": ({"exclude_modules": r".*0\..*"}, {Q[1]: R8, V[1]: R8}),
    "a layer": ({"layers_to_transform": 1}, {Q[1]: R8, V[1]: R8}),
    "layers": ({"layers_to_transform": [0, 7], "layers_pattern": ["h", "layers"]}, {Q[0]: R8, V[0]: R8}),
    "no layers": ({"layers_to_transform": []}, dict.fromkeys(Q + V, R8)),
    "a whole name in any layer": (
        {"target_modules": ["v_proj", Q[0]], "layers_to_transform": [1]}, {Q[0]: R8, V[1]: R8},
    ),
    "the first pattern": (
        {"rank_pattern": {"1.self_attn.q_proj": 2, "q_proj": 4, "v": 3}, "alpha_pattern": {".*q_proj": 4}},
        {Q[0]: (4, 1.0), Q[1]: (2, 2.0), V[0]: R8, V[1]: R8},
    ),
    "patterns and rslora": (
        {"use_rslora": True, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"^model.*1.*.v_proj": 1}},
        dict.fromkeys(Q, (8, 8 / math.sqrt(8))) | {V[0]: (4, 4.0), V[1]: (4, 0.5)},
    ),
    "a pattern in parts": (
        {"rank_pattern": {"proj": 2, "layers.0": 2, "q_proj|v_proj": 4}}, dict.fromkeys(Q + V, (4, 2.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_ranks_scales_and_targets_are_those_of_peft(
    tmp_path: Path, base: HuggingFaceDirectory, case: str
) -> None:
    settings, wanted = CONFIGS[case]
    tensors = tensors_of({name: rank for name, (rank, _) in wanted.items()}, random_tensors(MULTI_QUERY))
    adapter = read_peft(write(tmp_path, settings, tensors), base.config)
    found = {
        f"model.layers.{layer}.self_attn.{parameter[-1]}_proj": (pair.rank, pair.scale)
        for (parameter, layer), pair in adapter.pairs.items()
        if "attention" in parameter
    }
    assert found == {name: pytest.approx(value) for name, value in wanted.items() if "self_attn" in name}
    assert len(adapter.pairs) == len(wanted)


@pytest.mark.parametrize(
    "indices", [[7, 4], {"embed_tokens": [7, 4]}, {"embed_tokens": [7, 4], "lm_head": [7, 4]}]
)
def test_rows_of_the_embedding_are_in_the_order_of_the_list(
    tmp_path: Path, base: HuggingFaceDirectory, indices: Any
) -> None:
    tensors = tensors_of({}, random_tensors(MULTI_QUERY), 2)
    settings = {"target_modules": [], "trainable_token_indices": indices}
    adapter = read_peft(write(tmp_path, settings, tensors), base.config)
    assert adapter.pairs == {} and [*adapter.rows] == [7, 4]
    np.testing.assert_array_equal(list(adapter.rows.values()), tensors[ROWS])
    assert stacked([adapter], base.config) == (1, (), (4, 7), {})


def test_adapters_of_different_ranks_and_projections_are_stacked(
    tmp_path: Path, base: HuggingFaceDirectory
) -> None:
    weights, adapters = random_tensors(MULTI_QUERY), []
    for i, (rank, targets) in enumerate([(2, ["q_proj", "up_proj"]), (3, [Q[1], V[0]])]):
        names = targets if i else modules(0, 1, of=("q_proj", "up_proj"))
        tensors = tensors_of(dict.fromkeys(names, rank), weights)
        adapters.append(
            read_peft(write(tmp_path / str(i), {"r": rank, "target_modules": targets}, tensors), base.config)
        )
    rank, projections, rows, arrays = stacked(adapters, base.config)
    assert (rank, projections, rows) == (3, ("q", "v", "up"), ())
    for name in ("attention.q", "attention.v", "feed_forward.up"):
        a, b = arrays[f"blocks.{name}.a"], arrays[f"blocks.{name}.b"]
        assert a.dtype == b.dtype == np.float32
        for i, adapter in enumerate(adapters):
            for layer in (0, 1):
                pair = adapter.pairs.get((f"blocks.{name}", layer))
                low = pair.scale * np.tensordot(pair.a, pair.b, 1) if pair else np.zeros(())
                np.testing.assert_allclose(
                    np.tensordot(a[layer, i], b[layer, i], 1), low + 0 * low, atol=1e-5
                )


REFUSED: list[tuple[str, Any]] = [
    ("peft_type", "IA3"), ("peft_type", None), ("task_type", "SEQ_CLS"), ("bias", "all"), ("use_dora", True),
    ("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa"), ("fan_in_fan_out", True), ("a_key", 1),
    ("lora_bias", True), ("target_parameters", ["a"]), ("layer_replication", [[0, 1]]), ("use_qalora", True),
    ("megatron_config", {}), ("alora_invocation_tokens", [1]), ("r", 0), ("r", True), ("r", 10**6),
    ("lora_alpha", "8"), ("lora_alpha", 1e300), ("use_rslora", "yes"), ("exclude_modules", 3),
    ("layers_to_transform", [0.5]), ("layers_pattern", [1]), ("rank_pattern", []),
    ("rank_pattern", {"q_proj": 4.5}), ("alpha_pattern", {"q_proj": float("nan")}), ("target_modules", [1]),
    ("target_modules", ["c_attn"]), ("target_modules", []), ("target_modules", ".*"),
    ("target_modules", ["q_proj", "embed_tokens"]), ("target_modules", ["lm_head"]),
    ("trainable_token_indices", [500]), ("trainable_token_indices", [1, 1]),
    ("trainable_token_indices", {"lm_head": [1]}),
    ("trainable_token_indices", {"embed_tokens": [1], "lm_head": [2]}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_key_that_is_not_supported_is_refused_by_name(
    tmp_path: Path, base: HuggingFaceDirectory, key: str, value: Any
) -> None:
    tensors = tensors_of(dict.fromkeys(Q + V, 8), random_tensors(MULTI_QUERY))
    read_peft(write(tmp_path, {}, tensors), base.config)
    with pytest.raises(UserError, match=naming(tmp_path / "adapter_config.json", key)):
        read_peft(write(tmp_path, {key: value}, tensors), base.config)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
@pytest.mark.parametrize("pattern", ["q(", "(.|.|.)*!"])
def test_a_regular_expression_that_is_wrong_or_takes_for_ever_is_refused(
    tmp_path: Path, base: HuggingFaceDirectory, monkeypatch: pytest.MonkeyPatch, key: str, pattern: str
) -> None:
    monkeypatch.setattr(peft, "MATCHING_SECONDS", 0.5 if "!" in pattern else 60)
    settings: dict[str, Any] = {"layers_to_transform": 1} if key == "layers_pattern" else {}
    settings |= {key: {"q_proj": 2, pattern: 2} if key == "rank_pattern" else pattern}
    with pytest.raises(UserError, match=naming(tmp_path / "adapter_config.json", pattern)):
        read_peft(write(tmp_path, settings, {}), base.config)


def test_tensors_that_are_not_those_of_the_config_and_the_model_are_refused(
    tmp_path: Path, base: HuggingFaceDirectory
) -> None:
    whole = tensors_of(dict.fromkeys(Q + V, 8), random_tensors(MULTI_QUERY))
    other = f"{PREFIX}{V[1]}.lora_B.weight"
    holed, infinite = whole[other].copy(), whole[other].astype(np.float16)
    holed[0, 0], infinite[1, 1] = np.nan, np.inf
    changes: dict[str, tuple[dict[str, Any], Files]] = {
        other: ({}, {name: x for name, x in whole.items() if name != other}),  # a target without its tensor
        "x.lora_A.weight": ({}, whole | {"x.lora_A.weight": whole[other]}),  # a tensor without a target
        f"{PREFIX}{Q[0]}.lora_A.weight": ({"r": 4}, whole),
        other.replace("B", "A"): ({"rank_pattern": {V[1]: 4}}, whole),
        f"{PREFIX}{V[0]}.lora_A.weight": ({"target_modules": ["q_proj"]}, whole),
        ROWS: ({"trainable_token_indices": [4]}, whole | {ROWS: np.zeros((2, 32), np.float32)}),
        f" {other} ": ({}, whole | {other: holed}),
        f"{other} ": ({}, whole | {other: infinite}),
        f" {other}": ({}, whole | {other: whole[other].astype(np.int32)}),
    }
    for name, (settings, tensors) in changes.items():
        with pytest.raises(UserError) as error:
            read_peft(write(tmp_path, settings, tensors), base.config)
        assert name.strip() in str(error.value) and str(tmp_path) in str(error.value)
    write(tmp_path, {}, whole)
    deeper = TransformerConfig(**(vars(base.config) | {"num_layers": 3}))
    wider = TransformerConfig(**(vars(base.config) | {"embed_dim": 64}))
    for config in (deeper, wider):
        with pytest.raises(UserError, match="lora_A"):
            read_peft(tmp_path, config)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=naming(tmp_path, "adapter_model.safetensors")):
        read_peft(tmp_path, base.config)


def test_an_adapter_of_ours_knows_its_flipped_bits(tmp_path: Path, base: HuggingFaceDirectory) -> None:
    tensors = tensors_of(dict.fromkeys(Q + V, 8), random_tensors(MULTI_QUERY))
    write_peft(tmp_path, read_peft(write(tmp_path / "a", {}, tensors), base.config), base.config)
    raw = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    raw[-30] ^= 4
    (tmp_path / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="lora_B"):
        read_peft(tmp_path, base.config)


def test_damaged_files_are_read_or_refused(tmp_path: Path, base: HuggingFaceDirectory) -> None:
    """Never a crash or a hang, and what is read is finite."""
    rng, refused, read = random.Random(0), 0, 0
    settings = {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1],
        "exclude_modules": ["up_proj"], "bias": "none", "trainable_token_indices": [3, 4],
    }  # fmt: skip
    tensors = tensors_of(dict.fromkeys(Q + V, 2), random_tensors(MULTI_QUERY), 2)
    write(tmp_path, settings, tensors)
    files = {
        path: path.read_bytes()
        for path in (tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors")
    }
    for number in range(4_000):
        path = [*files][number % 2]
        path.unlink()  # a file that is mapped must not be changed
        path.write_bytes(damaged(rng, files[path], change_text))
        started = time.process_time()
        try:
            adapter = read_peft(tmp_path, base.config)
        except UserError:
            refused += 1
        else:
            assert all(
                np.isfinite(pair.a).all() and np.isfinite(pair.b).all() for pair in adapter.pairs.values()
            )
            read += 1
        assert time.process_time() - started < 10
        path.unlink()
        path.write_bytes(files[path])
    assert refused > 1500 and read > 100
