"""Gemma in GGUF files: what is written is read, here and by llama.cpp, and another model is refused."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.pretrained.gguf import GGUFWeights
from gemma_jax.pretrained.huggingface import from_stored, to_stored
from gemma_jax.pretrained.layout import in_order, parameter_shapes
from gemma_jax.tokenizer import Tokenizer
from tests.pretrained.gguf_files import read_all, write
from tests.pretrained.published import MULTI_QUERY, random_tensors, write_huggingface

ONE = MeshConfig(cpu_devices=1)
# Rows of every matrix are multiples of 32, the block of q8_0 and q4_0.
CONFIG = MULTI_QUERY | {"hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2, "intermediate_size": 96}


def source(tmp_path: Path, dtype: str = "bfloat16") -> Path:
    return write_huggingface(tmp_path / "source", CONFIG, random_tensors(CONFIG, dtype))


def convert(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def arrays(path: Path) -> dict[tuple[str, int | None], np.ndarray]:
    found = open_checkpoint(path)
    assert found.weights is not None
    return {place: found.weights.get(*place) for place in in_order(found.config)}


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"{a} {b} {a * b}\n" for a in range(60) for b in range(60)]
    return Tokenizer.train(texts, 378, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_bfloat16_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = source(tmp_path)
    convert(folder, tmp_path / "gguf", "--format", "gguf")
    convert(tmp_path / "gguf" / "model.gguf", tmp_path / "again", "--dtype", "bfloat16")
    before, after = arrays(folder), arrays(tmp_path / "again")
    for place, x in before.items():
        assert x.tobytes() == after[place].tobytes(), place
    found = open_checkpoint(tmp_path / "gguf")
    assert found.config == open_checkpoint(folder).config
    assert isinstance(found.weights, GGUFWeights) and found.weights.quantized == ""
    assert found.tokenizer() is None and found.end_tokens() == (1,)


@pytest.mark.parametrize(("quantization", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_quantised_weights_are_those_of_the_package(tmp_path: Path, quantization: str, kind: str) -> None:
    folder = source(tmp_path, "float32")
    gemma = Gemma.from_pretrained(folder, mesh=ONE)
    gemma.save_pretrained(tmp_path / "gguf", format="gguf", quantization=quantization)
    shapes = parameter_shapes(gemma.config)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert theirs["token_embd.weight"].tensor_type.name == "Q8_0"
    assert theirs["blk.1.ffn_down.weight"].tensor_type.name == kind
    after = arrays(tmp_path / "gguf")
    for (parameter, layer), x in arrays(folder).items():
        stored = to_stored(parameter, x)
        if stored.ndim == 1:
            np.testing.assert_array_equal(after[parameter, layer], (x + 1) - np.float32(1))
            continue
        used = gguf.GGMLQuantizationType["Q8_0" if parameter == "embedding" else kind]
        expected = from_stored(parameter, dequantize(quantize(stored, used), used), shapes[parameter])
        np.testing.assert_array_equal(after[parameter, layer], expected, err_msg=parameter)
    found = open_checkpoint(tmp_path / "gguf")
    assert found.quantization == {"int8": "int8:32", "int4": "int4"}[quantization]
    assert found.dtype == "float32"


READABLE = ["Q4_1", "Q5_0", "Q5_1", "F16", "BF16"]  # of those that the package also writes in blocks of 32


@pytest.mark.parametrize("kind", READABLE)
def test_other_types_are_read(tmp_path: Path, kind: str) -> None:
    """And a head of its own that is the embedding, an alignment, keys that mean what Gemma does anyway."""
    keys = {"gemma.rope.scaling.type": "none", "gemma.rope.dimension_count": 32, "gemma.vocab_size": 8}
    path = write(tmp_path / "x.gguf", keys, kind=kind, alignment=64)
    weights = GGUFWeights(path)
    assert weights.config.vocab_size == 8 and weights.config.norm_epsilon == 1e-6
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    expected = dequantize(theirs.data, theirs.tensor_type).reshape(32, 32).T
    np.testing.assert_array_equal(weights.get("blocks.feed_forward.up", 0).astype(np.float32), expected)
    assert weights.quantized == ("" if "F16" in kind else "int4" if kind == "Q4_1" else "int8:32")


TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # arguments of `write`, and what the message names
    "architecture": ({"architecture": "gemma2"}, "'gemma2'"),
    "adapter": ({"keys": {"general.type": "adapter"}}, "'adapter'"),
    "part": ({"keys": {"split.count": 3}}, "split.count 3"),
    "rope scaling": ({"keys": {"gemma.rope.scaling.type": "yarn"}}, "'yarn'"),
    "unknown": ({"keys": {"gemma.final_logit_softcapping": 30.0}}, "final_logit_softcapping 30.0"),
    "lacking": ({"keys": {"gemma.attention.key_length": None}}, "attention.key_length is missing"),
    "not a number": ({"keys": {"gemma.rope.freq_base": math.nan}}, "rope_base is nan"),
    "infinite": ({"keys": {"gemma.attention.layer_norm_rms_epsilon": math.inf}}, "norm_epsilon is inf"),
    "kind of number": ({"keys": {"gemma.block_count": 1.0}}, "block_count is 1.0"),
    "one for each layer": ({"keys": {"gemma.attention.head_count": [1]}}, "head_count is [1]"),
    "values": ({"keys": {"gemma.attention.value_length": 16}}, "value_length 16"),
    "heads": ({"keys": {"gemma.attention.head_count_kv": 3}}, "num_kv_heads is 3"),
    "shape": ({"keys": {"gemma.feed_forward_length": 64}}, "blk.0.ffn_gate.weight"),
    "layers": ({"keys": {"gemma.block_count": 2**20}}, "blk.1.attn_norm.weight"),
    "tensor": ({"shapes": {"rope_freqs.weight": (16,)}}, "rope_freqs.weight"),
    "head": ({"shapes": {"output.weight": (8, 32)}}, "output.weight"),
    "type": ({"kind": "I8"}, "I8"),
    "end": ({"keys": {"tokenizer.ggml.eos_token_id": 8}}, "has 8 as"),
    "tokenizer": ({"keys": TOKENS}, "'gpt2'"),
    "tokens": ({"keys": TOKENS | {"tokenizer.ggml.model": "llama"}}, "'llama'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_another_model_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    arguments, named = REFUSED[fault]
    path = write(tmp_path / "model.gguf", **arguments)
    with pytest.raises(UserError) as error:
        read_all(path)
    assert named in str(error.value) and "model.gguf" in str(error.value) and len(str(error.value)) < 600
    open_checkpoint(write(tmp_path / "whole.gguf"))


# In nats. llama.cpp rounds the activations to bfloat16 for bfloat16 weights, and to 8 bits in blocks for
# quantised ones. Measured: 0.011, 0.026 and 0.033, where log-probabilities have a standard deviation of 0.99.
TOLERANCE = {"": 0.03, "int8": 0.08, "int4": 0.08}
TEXTS = [
    "12 13 156\n",
    "<start_of_turn>user\nHi  there<end_of_turn>\n\n\n  \t   x",
    "  leading, <unused7> <mask> [@BOS@] <2mass> <b>bold</b> 0x09 é𐍈 in <eos>\n\n\n\n",
    " " * 70,
]


def as_written_here(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    config = CONFIG | {"vocab_size": tokenizer.vocab_size + 3, "num_hidden_layers": 1}
    gemma = Gemma.from_pretrained(
        write_huggingface(tmp_path / "source", config, random_tensors(config)), mesh=ONE
    )
    gemma = Gemma(gemma.spec, gemma.params, tokenizer, end_tokens=(1, 107))
    gemma.save_pretrained(tmp_path / "out", format="gguf")
    (tmp_path / "alone").mkdir()
    return shutil.copy(tmp_path / "out" / "model.gguf", tmp_path / "alone" / "any.gguf")


def as_converted_by_llama_cpp(tokenizer: Tokenizer, tmp_path: Path, added: bool) -> Path:
    """With the pieces that transformers lists as added tokens, or without such a list."""
    pieces = []
    for piece, score, kind in tokenizer.pieces():
        if kind != 4:
            pieces.append((piece, score, kind))
        elif not added:
            pieces.append((piece, score, 1))
        else:
            control = tokenizer.acts_as_control(piece)
            pieces.append((piece if control else piece.replace("\u2581", " "), -1000.0, 3 if control else 4))
    texts, scores, types = map(list, zip(*pieces, strict=True))
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": 1}
    keys |= {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.scores": scores}
    keys |= {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eot_token_id": 107}
    return write(tmp_path / "llama.gguf", keys, {"token_embd.weight": (len(texts), 32)})


WRITERS: dict[str, Callable[[Tokenizer, Path], Path]] = {
    "here": as_written_here,
    "llama.cpp": lambda tokenizer, tmp_path: as_converted_by_llama_cpp(tokenizer, tmp_path, added=False),
    "llama.cpp with added tokens": lambda tokenizer, tmp_path: as_converted_by_llama_cpp(
        tokenizer, tmp_path, True
    ),
}


def check_same(tokenizer: Tokenizer, path: Path, texts: list[str]) -> None:
    rebuilt = open_checkpoint(path).tokenizer()
    assert rebuilt is not None and rebuilt.vocab_size == tokenizer.vocab_size
    for text in texts:
        assert rebuilt.encode(text) == tokenizer.encode(text), text
        assert rebuilt.encode_typed(text) == tokenizer.encode_typed(text), text
        assert rebuilt.decode(rebuilt.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("writer", WRITERS)
def test_the_tokenizer_of_a_file_encodes_like_the_original(
    tmp_path: Path, small_tokenizer: Tokenizer, writer: str
) -> None:
    path = WRITERS[writer](small_tokenizer, tmp_path)
    check_same(small_tokenizer, path, TEXTS)
    # llama.cpp's converter names an end of turn for pretrained models too, but no chat template.
    assert open_checkpoint(path).end_tokens() == ((1, 107) if writer == "here" else (1,))
    named = shutil.copy(path, tmp_path / "gemma-2b-it.Q8_0.gguf")
    assert open_checkpoint(named).end_tokens() == (1, 107)


@pytest.mark.parametrize("writer", ["llama.cpp", "llama.cpp with added tokens"])
def test_gemmas_own_tokenizer(shared_data: Path, tmp_path: Path, writer: str) -> None:
    folder = shared_data / "gemma_tokenizer"
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    lines = (folder / "golden_tokenisations.jsonl").read_text().splitlines()
    texts = [json.loads(line).get("text", "") for line in lines]
    check_same(tokenizer, WRITERS[writer](tokenizer, tmp_path), TEXTS + texts)


@pytest.mark.slow
def test_a_file_is_a_checkpoint_wherever_one_is_taken(
    tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = as_written_here(small_tokenizer, tmp_path)
    for name in (path, path.parent):
        gemma = Gemma.from_pretrained(name, mesh=ONE)
        assert gemma.instruction_tuned and gemma.tokenizer.vocab_size == 378
        assert main(["inspect", str(name)]) == 0
        assert main(["verify", str(name)]) == 0
        assert main(["sample", str(name), "--prompt", "12", "--max_new_tokens", "2"]) == 0
    assert "instruction-tuned" in capsys.readouterr().out
    # A tokenizer.model beside the file counts more than the one in it.
    other = Tokenizer.train(["another text 123456789"] * 9, 390, path.parent / "tokenizer.model")
    found = open_checkpoint(path).tokenizer()
    assert found is not None and found.fingerprint == other.fingerprint
    shutil.copy(path, path.with_name("second.gguf"))
    with pytest.raises(UserError, match=r"any\.gguf, second\.gguf"):
        open_checkpoint(path.parent)


def llama_cpp(path: Path, prompt: str | list[int]) -> dict[int, float]:
    """The log-probabilities of the 20 likeliest tokens after a prompt, as llama.cpp computes them."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), 256, 1
    parameters.warmup, parameters.verbosity = False, 0
    answers: list[Any] = []
    request = {"prompt": prompt, "max_tokens": 1, "logprobs": 20, "temperature": 0}
    xllamacpp.Server(parameters).handle_completions(request, answers.append)
    answer = answers[0] if isinstance(answers[0], dict) else json.loads(answers[0])
    [token] = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}


@pytest.mark.skipif(not os.environ.get("GEMMA_JAX_PARITY"), reason="`make parity` installs llama.cpp")
@pytest.mark.parametrize("quantization", ["", "int8", "int4"])
def test_llama_cpp_computes_the_same(tmp_path: Path, small_tokenizer: Tokenizer, quantization: str) -> None:
    """The log-probabilities of the likeliest tokens after a prompt, given as tokens and as text."""
    config = CONFIG | {"vocab_size": 380, "head_dim": 256, "num_key_value_heads": 1}
    folder = write_huggingface(tmp_path / "source", config, random_tensors(config, "bfloat16"))
    gemma = Gemma.from_pretrained(folder, mesh=ONE)
    gemma = Gemma(gemma.spec, gemma.params, small_tokenizer, end_tokens=(1, 107))
    gemma.save_pretrained(tmp_path / "out", format="gguf", quantization=quantization)
    ours = Gemma.from_pretrained(tmp_path / "out", mesh=ONE) if quantization else gemma
    prompt = "<start_of_turn>user\n12 13  156<end_of_turn>\n\n<start_of_turn>model\n3 é"
    ids = [2, *small_tokenizer.encode(prompt)]
    logits = ours.logits([ids])[0, -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    theirs = llama_cpp(tmp_path / "out" / "model.gguf", ids)
    assert len(theirs) == 20
    gap = max(abs(expected[token] - value) for token, value in theirs.items())
    assert gap < TOLERANCE[quantization]
    assert llama_cpp(tmp_path / "out" / "model.gguf", prompt) == theirs


def test_what_a_gguf_file_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = source(tmp_path, "float32")
    odd = CONFIG | {"hidden_size": 40}
    write_huggingface(tmp_path / "odd", odd, random_tensors(odd))
    large = random_tensors(CONFIG)
    large["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    write_huggingface(tmp_path / "large", CONFIG, large)
    gguf_form = ["--format", "gguf"]
    for name, options, said in (
        (folder, ["--dtype", "float32", *gguf_form], "float32"),
        (folder, ["--quantization", "int3", *gguf_form], "int3"),
        (folder, ["--quantization", "int8"], "int8"),
        (tmp_path / "odd", ["--quantization", "int8", *gguf_form], "rows of 40"),
        (tmp_path / "large", ["--quantization", "int4", *gguf_form], "1e+06"),
    ):
        found = open_checkpoint(name)
        with pytest.raises(UserError, match=said.replace("+", r"\+")):
            _export(tmp_path / "out", found, options)
        assert not (tmp_path / "out").exists()
    convert(tmp_path / "odd", tmp_path / "out", *gguf_form)


def _export(destination: Path, found: Any, options: list[str]) -> None:
    from gemma_jax.pretrained.export import export

    told = dict(zip(options[::2], options[1::2], strict=True))
    export(
        destination,
        told.get("--format", "huggingface"),  # type: ignore[arg-type]  # any text, to be refused
        found.weights,
        found.config,
        dtype=told.get("--dtype", ""),
        end_tokens=(1,),
        tokenizer=None,
        terms_source="",
        quantization=told.get("--quantization", ""),
    )
