"""Published Flax directories, made by hand with orbax in both forms: every number, and each fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest

from gemma_jax.config import TransformerConfig, replace
from gemma_jax.errors import UserError
from gemma_jax.pretrained.checkpoint import open_checkpoint
from tests.messages import naming

Arrays = dict[str, np.ndarray]
TWO_B = TransformerConfig(
    vocab_size=96, num_layers=3, embed_dim=32, hidden_dim=48, num_heads=4, num_kv_heads=1, head_dim=16
)
SEVEN_B = replace(TWO_B, {"num_kv_heads": 4, "embed_dim": 40})


def published(config: TransformerConfig, rows: int = 128, dtype: Any = ml_dtypes.bfloat16) -> Arrays:
    """Arrays by their published names, as the model report's code names them."""
    rng = np.random.default_rng(0)
    D, F, H = config.embed_dim, config.hidden_dim, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    shapes: dict[str, tuple[int, ...]] = {"embedder/input_embedding": (rows, D), "final_norm/scale": (D,)}
    for i in range(config.num_layers):
        layer = f"layer_{i}"
        if K == N:
            shapes[f"{layer}/attn/qkv_einsum/w"] = (3, N, D, H)
        else:
            shapes |= {f"{layer}/attn/q_einsum/w": (N, D, H), f"{layer}/attn/kv_einsum/w": (2, K, D, H)}
        shapes |= {
            f"{layer}/attn/attn_vec_einsum/w": (N, H, D),
            f"{layer}/mlp/gating_einsum": (2, D, F),
            f"{layer}/mlp/linear": (F, D),
            f"{layer}/pre_attention_norm/scale": (D,),
            f"{layer}/pre_ffw_norm/scale": (D,),
        }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def save(folder: Path, arrays: Arrays, form: str) -> Path:
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        if form == "flat":
            if "/mlp/" in name:
                name += "/w"
            path, _, leaf = f"transformer/{name}".rpartition("/")
            tree.setdefault(path, {})[leaf] = x
        else:
            *path_of, leaf = name.split("/")
            place = tree.setdefault("transformer", {})
            for key in path_of:
                place = place.setdefault(key, {})
            place[leaf] = x
    orbax.checkpoint.PyTreeCheckpointer().save(folder.absolute(), tree)
    return folder


@pytest.mark.parametrize("form", ["flat", "nested"])
@pytest.mark.parametrize("config", [TWO_B, SEVEN_B], ids=["2B", "7B"])
def test_every_number_is_in_its_place(tmp_path: Path, config: TransformerConfig, form: str) -> None:
    arrays = published(config)
    found = open_checkpoint(save(tmp_path / "2b", arrays, form))
    # Without a config or a tokenizer beside it, all rows of the embedding are taken for vocabulary.
    assert found.config == replace(config, {"vocab_size": 128})
    assert found.dtype == "bfloat16"
    assert found.weights is not None
    get, same = found.weights.get, np.testing.assert_array_equal
    same(get("embedding", None), arrays["embedder/input_embedding"])
    same(get("final_norm", None), arrays["final_norm/scale"])
    for i in range(config.num_layers):
        layer = {name.removeprefix(f"layer_{i}/"): x for name, x in arrays.items() if f"layer_{i}/" in name}
        if "attn/qkv_einsum/w" in layer:
            q, k, v = layer["attn/qkv_einsum/w"]
        else:
            q, (k, v) = layer["attn/q_einsum/w"], layer["attn/kv_einsum/w"]
        for name, theirs in (("q", q), ("k", k), ("v", v)):
            ours = get(f"blocks.attention.{name}", i)
            for head in range(theirs.shape[0]):
                same(ours[:, head], theirs[head])
        same(get("blocks.attention.o", i), layer["attn/attn_vec_einsum/w"])
        same(get("blocks.feed_forward.gate", i), layer["mlp/gating_einsum"][0])
        same(get("blocks.feed_forward.up", i), layer["mlp/gating_einsum"][1])
        same(get("blocks.feed_forward.down", i), layer["mlp/linear"])
        same(get("blocks.attention_norm", i), layer["pre_attention_norm/scale"])
        same(get("blocks.feed_forward_norm", i), layer["pre_ffw_norm/scale"])


def test_the_published_rows_are_known_to_hold_padding(tmp_path: Path) -> None:
    config = replace(TWO_B, {"embed_dim": 2, "hidden_dim": 2, "num_layers": 1})
    found = open_checkpoint(save(tmp_path / "root" / "2b", published(config, 256_128), "flat").parent)
    assert found.config.vocab_size == found.config.vocab_rows == 256_000
    assert found.weights is not None and found.weights.get("embedding", None).shape == (256_000, 2)


def renamed(arrays: Arrays, old: str, new: str) -> Arrays:
    return {new if name == old else name: x for name, x in arrays.items()}


FAULTS: dict[str, tuple[Callable[[Arrays], Arrays], tuple[object, ...]]] = {
    "missing": (
        lambda a: {name: x for name, x in a.items() if name != "layer_1/mlp/linear"},
        ("layer_1/mlp/linear", "(48, 32)"),
    ),
    "extra": (
        lambda a: a | {"layer_1/mlp/bias": np.zeros(3, np.float32)},
        ("'layer_1/mlp/bias'", "(3,)"),
    ),
    "mis-shaped": (
        lambda a: a | {"layer_2/attn/q_einsum/w": np.zeros((4, 32, 8), np.float32)},
        ("layer_2/attn/q_einsum'", "(4, 32, 8)", "(4, 32, 16)"),
    ),
    "a layer left out": (
        lambda a: renamed(a, "layer_1/mlp/linear", "layer_7/mlp/linear"),
        ("layer_1/mlp/linear",),
    ),
    "another dtype": (
        lambda a: a | {"final_norm/scale": np.zeros(32, np.int32)},
        ("final_norm/scale", "int32"),
    ),
    "no table": (lambda a: renamed(a, "embedder/input_embedding", "x"), ("embedder/input_embedding",)),
    "axes": (
        lambda a: a | {"layer_0/attn/attn_vec_einsum/w": np.zeros((4, 4), np.float32)},
        ("attn_vec_einsum", "(4, 4)", 3),
    ),
}


@pytest.mark.parametrize(("change", "told"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_named(
    tmp_path: Path, change: Callable[[Arrays], Arrays], told: tuple[object, ...]
) -> None:
    folder = save(tmp_path / "2b", change(published(TWO_B)), "flat")
    with pytest.raises(UserError, match=naming(*told)):
        open_checkpoint(folder)


def test_a_checkpoint_of_the_other_size_contradicts_the_config_beside_it(tmp_path: Path) -> None:
    from gemma_jax.pretrained.published_config import write_config

    folder = save(tmp_path / "2b", published(SEVEN_B), "flat")
    write_config(tmp_path, TWO_B, "bfloat16")
    for name in (folder, tmp_path):
        with pytest.raises(UserError, match=r"config\.json"):
            open_checkpoint(name)
    write_config(tmp_path, replace(SEVEN_B, {"embed_dim": 32}), "bfloat16")
    with pytest.raises(UserError, match=naming("input_embedding'", "(128, 40)", "(128, 32)")):
        open_checkpoint(folder)
    write_config(tmp_path, SEVEN_B, "bfloat16")
    assert open_checkpoint(folder).config == SEVEN_B


def test_two_checkpoints_side_by_side_have_to_be_told_apart(tmp_path: Path) -> None:
    for name in ("2b", "7b"):
        save(tmp_path / name, published(TWO_B), "flat")
    with pytest.raises(UserError, match=naming("(2b, 7b)")):
        open_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's, later
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_ends_in_one_sentence(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path / "damaged", published(replace(TWO_B, {"num_layers": 1})), "flat")
    for path in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]:
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError):
        open_checkpoint(folder)
