"""Directories that bitsandbytes has quantised, and quantised weights wherever weights are kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import ComputeConfig, MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.pretrained.layout import in_order
from gemma_jax.pretrained.safetensors import SafetensorsFile
from gemma_jax.sharding import named_arrays
from gemma_jax.testing import cpu_mesh
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.verification import WINDOW, compare_logits
from tests.messages import naming
from tests.pretrained import published

CONFIG = published.MULTI_QUERY | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 64,
    "vocab_size": 387,
}
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
QUERY = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{QUERY}.quant_state.bitsandbytes__nf4"

published.TYPES |= {"int8": ("I8", np.int8), "uint8": ("U8", np.uint8)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    published.write_huggingface(folder, CONFIG, published.random_tensors(CONFIG, "bfloat16"))
    texts = [f"{a} and {b}\n" for a in range(60) for b in range(60)]
    Tokenizer.train(texts, CONFIG["vocab_size"], folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def nf4(dense: Path) -> Path:
    folder = dense.parent / "nf4"
    assert main(["convert", str(dense), str(folder), "--quantization", "nf4"]) == 0
    return folder


def arrays(folder: Path, quantization: str = "", **axes: int) -> dict[str, np.ndarray]:
    """What is in the memory of a mesh once a checkpoint is loaded."""
    found = open_checkpoint(folder)
    mesh = cpu_mesh(8, **axes) if axes else cpu_mesh(1)
    compute = ComputeConfig(param_dtype="bfloat16")
    spec = ModelSpec(found.config, compute, mesh, found.kind(quantization))
    return {name: np.asarray(x) for name, x in named_arrays(found.params(spec)).items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: np.array(file[name]) for name in file.tensors}


def changed(
    source: Path, folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], Any]
) -> Path:
    """A copy of a directory after a change of its tensors and its config."""
    tensors, config = tensors_of(source), json.loads((source / "config.json").read_text())
    change(tensors, config)
    published.write_huggingface(folder, config, tensors)
    shutil.copy(source / "tokenizer.model", folder)
    return folder


def row_wise(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Turns a dense directory into one with int8 weights."""
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        x = tensors[name].astype(np.float32)
        scale = np.abs(x).max(1)
        tensors[name] = np.round(x * ((np.float32(1) / scale) * np.float32(127))[:, None]).astype(np.int8)
        tensors[f"{name.removesuffix('weight')}SCB"] = scale
        tensors[f"{name.removesuffix('weight')}weight_format"] = np.zeros((), np.uint8)


@pytest.mark.parametrize("axes", [{}, EIGHT], ids=["one", "eight"])
def test_nf4_that_is_read_is_what_was_quantised_here(dense: Path, nf4: Path, axes: dict[str, int]) -> None:
    assert open_checkpoint(nf4).quantization == "nf4,embedding=dense"
    assert_equal(arrays(nf4, **axes), arrays(dense, "nf4,embedding=dense", **axes))


@pytest.mark.parametrize("axes", [{}, EIGHT], ids=["one", "eight"])
def test_int8_that_is_read_is_what_is_quantised_here(
    dense: Path, tmp_path: Path, axes: dict[str, int]
) -> None:
    folder = changed(dense, tmp_path / "int8", row_wise)
    found, expected = arrays(folder, **axes), arrays(dense, "int8,embedding=dense", **axes)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name].astype(float), x.astype(float), rtol=1e-6, err_msg=name)


def test_scales_that_are_not_nested_are_nested_when_read(nf4: Path, dense: Path, tmp_path: Path) -> None:
    def unnest(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
            x = published.random_tensors(CONFIG, "bfloat16")[name].astype(np.float32)
            tensors[f"{name}.absmax"] = np.abs(x.reshape(-1, 64)).max(1)
            for key in ("nested_offset", "nested_blocksize", "nested_dtype"):
                del state[key]
            for part in ("nested_absmax", "nested_quant_map"):
                del tensors[f"{name}.{part}"]
            text = json.dumps(state).encode()
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)

    assert_equal(arrays(changed(nf4, tmp_path / "plain", unnest)), arrays(nf4))


@pytest.mark.parametrize(
    "quantization",
    [pytest.param("int8", marks=pytest.mark.slow), "int4", pytest.param("nf4", marks=pytest.mark.slow)],
)
def test_a_run_holds_any_kind_and_is_quantised_when_loaded(
    dense: Path, tmp_path: Path, quantization: str
) -> None:
    run, plain, again = (tmp_path / name for name in ("run", "plain", "again"))
    assert main(["convert", str(dense), str(run), "--format", "run", "--quantization", quantization]) == 0
    assert main(["convert", str(dense), str(plain), "--format", "run"]) == 0
    expected = arrays(dense, quantization)
    assert_equal(arrays(run, **EIGHT), expected)
    assert_equal(arrays(plain, quantization, **EIGHT), expected)
    # Dense again: the numbers that the codes stand for.
    assert main(["convert", str(run), str(again), "--dtype", "float32"]) == 0
    if quantization != "int4":  # whose scale is fitted, and would be once more
        codes = {name: x for name, x in expected.items() if name.endswith("codes")}
        once_more = arrays(again, quantization)
        assert_equal({name: once_more[name] for name in codes}, codes)


def test_an_embedding_is_sent_some_rows_after_the_other(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are its padding rows, of which there are more than such a piece has."""
    whole = {kind: arrays(dense, kind) for kind in ("", "int8")}
    monkeypatch.setattr("gemma_jax.weights.weight.ROW_BLOCK", 32)
    for kind, expected in whole.items():
        assert_equal(arrays(dense, kind), expected)


@pytest.mark.slow
def test_gemma_computes_with_what_it_loads(dense: Path, nf4: Path) -> None:
    """Every kind is nearer to the dense model the more bits it has."""
    tokens = [[2, *range(10, 40)]]
    expected = Gemma.from_pretrained(dense).logits(tokens)
    errors = {
        kind: float(np.std(Gemma.from_pretrained(dense, quantization=kind).logits(tokens) - expected))
        for kind in ("int8", "int4", "int4:channel", "nf4")
    }
    assert 0 < errors["int8"] < errors["int4"] / 5 and errors["int4"] < errors["int4:channel"]
    assert errors["nf4"] < errors["int4:channel"]
    own = float(np.std(Gemma.from_pretrained(nf4).logits(tokens) - expected))
    assert own <= errors["nf4"] * 1.05
    gemma = Gemma.from_pretrained(dense, quantization="int4", dtype="bfloat16")
    assert len(gemma.generate([[2, 9, 8]], max_new_tokens=5)[0].token_ids) > 0


def test_verify_reports_what_quantisation_costs(
    dense: Path, nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("12 and 57\n" * 1000)
    pages = []
    for arguments in ([dense, "--quantization", "nf4"], [nf4, "--against", dense]):
        assert main(["verify", *map(str, arguments), "--text", str(text), "--tokens", "300"]) == 0
        pages.append(capsys.readouterr().out)
    held = sum(x.size * x.dtype.itemsize for x in arrays(dense).values())
    for page in pages:
        assert "299 tokens" in page and f"{held:,}" in page and "%" in page and "logit error" in page


@pytest.mark.slow
def test_logits_are_compared_in_windows(dense: Path, nf4: Path) -> None:
    """The numbers of the comparison are those of the logits, window by window, on one device and on eight."""
    ids = [2, *np.random.default_rng(0).integers(4, 380, 300).tolist()]
    windows = [[2, *ids[1 + start : start + WINDOW]] for start in range(0, len(ids) - 1, WINDOW - 1)]
    one, eight = MeshConfig(cpu_devices=1), MeshConfig(**EIGHT)
    models = [Gemma.from_pretrained(folder, mesh=one) for folder in (nf4, dense)]
    logits = [[model.logits([window])[0, :-1] for window in windows] for model in models]
    ours, theirs = (np.concatenate(parts) for parts in logits)
    losses = [-np.mean(np.concatenate([np.ravel(x) for x in model.score(windows)])) for model in models]
    for mesh in (one, eight):
        pair = [Gemma.from_pretrained(folder, mesh=mesh) for folder in (nf4, dense)]
        found = compare_logits((pair[0].spec, pair[0].params), (pair[1].spec, pair[1].params), ids)
        assert found.tokens == 300 == len(ours)
        np.testing.assert_allclose((found.perplexity, found.other_perplexity), np.exp(losses), rtol=1e-4)
        np.testing.assert_allclose(found.largest, np.abs(ours - theirs).max(), rtol=1e-3)
        np.testing.assert_allclose(found.rms, np.sqrt(np.mean((ours - theirs) ** 2)), rtol=1e-3)
        agreement = np.mean(ours.argmax(-1) == theirs.argmax(-1))
        # On eight devices rounding may decide between two tokens.
        assert abs(found.agreement - agreement) < (1e-6 if mesh is one else 0.01) and 0.5 < agreement < 1


def break_state(**values: Any) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        state = json.loads(tensors[STATE].tobytes()) | values
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def put(name: str, value: np.ndarray | None) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


@pytest.mark.parametrize(("change", "named"), [
    (break_state(shape=[128, 256]), naming(QUERY, "128, 256")),
    (break_state(shape="all"), naming("shape", "all")),
    (break_state(blocksize=128), naming("blocksize", 128, 64)),
    (break_state(quant_type="fp4"), naming("quant_type", "fp4")),
    (break_state(nested_offset=-1), naming("nested_offset", -1)),
    (break_state(nested_offset=float("nan")), naming("nested_offset", "nan")),
    (break_state(nested_blocksize=64), naming("nested_blocksize", 64, 256)),
    (put(STATE, None), naming(QUERY, STATE.removeprefix(QUERY))),
    (put(STATE, np.frombuffer(b"[" * 60000, np.uint8)), "quant_state"),
    (put(f"{QUERY}.absmax", None), naming(QUERY, ".absmax")),
    (put(f"{QUERY}.absmax", np.zeros(3, np.uint8)), naming(QUERY, ".absmax", 3)),
    (put(f"{QUERY}.nested_absmax", np.full(2, np.inf, np.float32)), naming(QUERY, ".nested_absmax")),
    (put(f"{QUERY}.nested_quant_map", np.zeros(256, np.float32)), naming(QUERY, ".nested_quant_map")),
    (put(f"{QUERY}.quant_map", np.zeros(16, np.float32)), naming(QUERY, ".quant_map")),
    (put(QUERY, np.zeros((256, 128), np.float32)), naming(QUERY, "float32", "nf4")),
    (put(QUERY, np.zeros((9, 1), np.uint8)), naming(QUERY, "9")),
    (lambda tensors, config: config.update(quantization_config={"quant_method": "gptq"}), "gptq"),
    (lambda tensors, config: config.update(quantization_config=None), naming(QUERY, "16384, 1")),
])  # fmt: skip
def test_what_contradicts_itself_is_refused(nf4: Path, tmp_path: Path, change: Any, named: str) -> None:
    folder = changed(nf4, tmp_path / "changed", change)
    with pytest.raises(UserError, match=named):
        arrays(folder)


@pytest.mark.parametrize("scale", [np.inf, 0, -1, None])
def test_scales_of_int8_are_checked(dense: Path, tmp_path: Path, scale: float | None) -> None:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        row_wise(tensors, config)
        name = f"{QUERY.removesuffix('weight')}SCB"
        if scale is None:
            del tensors[name]
        else:
            tensors[name][3] = scale

    folder = changed(dense, tmp_path / "changed", change)
    with pytest.raises(UserError, match=naming(QUERY, "SCB")):
        arrays(folder)


def test_what_is_quantised_is_not_quantised_again(nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=naming(nf4, "nf4", "int8")):
        Gemma.from_pretrained(nf4, quantization="int8")
    gemma = Gemma.from_pretrained(nf4)
    assert "nf4" in repr(gemma)
    with pytest.raises(UserError, match=naming("nf4", "int8")):
        gemma.save_pretrained(tmp_path / "again", format="run", quantization="int8")
    for form in ("flax", "huggingface"):
        target = tmp_path / form
        assert main(["convert", str(nf4), str(target), "--format", form, "--quantization", "int8"]) == 2
        assert not target.exists()


@pytest.mark.skipif(not os.environ.get("GEMMA_JAX_PARITY"), reason="`make parity` has bitsandbytes")
def test_bitsandbytes_reads_what_is_written_here(nf4: Path) -> None:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    found, stored = open_checkpoint(nf4), tensors_of(nf4)
    for parameter, layer in in_order(found.config):
        if not (parameter.startswith("blocks.") and not parameter.endswith("norm")):
            continue
        assert found.weights is not None
        name = found.weights.where(parameter, layer).split(" in ")[0]
        parts = {key: torch.tensor(x) for key, x in stored.items() if key.startswith(f"{name}.")}
        state = QuantState.from_dict(parts, torch.device("cpu"))
        state.dtype = torch.float32
        theirs = dequantize_4bit(torch.tensor(stored[name]), state).numpy()
        ours = found.weights.get(parameter, layer)
        np.testing.assert_allclose(ours.reshape(theirs.shape[::-1]).T, theirs, atol=1e-6)
