"""Writes weights as a Hugging Face directory, a published Flax directory, a run directory, or a GGUF file."""

import contextlib
import functools
import json
import math
import os
import shutil
import time
import typing
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.checkpoint.lock import LOCK_FILE
from gemma_jax.checkpoint.record import RunRecord, storage_failure, without_echo
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import (
    ComputeConfig,
    MeshConfig,
    PretrainConfig,
    TransformerConfig,
    replace,
    to_dict,
    to_json,
)
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.paths import check_writable_path
from gemma_jax.pretrained.adapters import Adapter
from gemma_jax.pretrained.bitsandbytes import CONFIG as BITSANDBYTES
from gemma_jax.pretrained.checkpoint import TOKENIZER_FILE, holds_checkpoint
from gemma_jax.pretrained.end_tokens import END_OF_TURN
from gemma_jax.pretrained.flax import write_flax
from gemma_jax.pretrained.gguf import GGUF_FILE, write_gguf
from gemma_jax.pretrained.huggingface import write_huggingface
from gemma_jax.pretrained.layout import DTYPES, Weights, parameter_shapes
from gemma_jax.pretrained.peft import write_peft
from gemma_jax.pretrained.placement import place
from gemma_jax.pretrained.published_config import CONFIG_FILE, write_config, write_generation_config
from gemma_jax.pretrained.terms import write_notice
from gemma_jax.sharding import make_mesh
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.weights import EMBEDDING, Weight, kind_of

Form = Literal["huggingface", "flax", "run", "gguf"]
GGUF_TYPES = {"": "bf16", "int8": "q8_0", "int4": "q4_0"}  # by `quantization`
FLAX_FOLDER = "params"
# The dialogue format of Gemma's instruction-tuned models, for other tools that read it from the directory.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('Gemma has no system role') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, user first') }}{% endif %}"
    "{{ '<start_of_turn>' + ('user' if message['role'] == 'user' else 'model') + '\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class PlacedWeights:
    """Makes the parameters on a mesh readable as `Weights`."""

    def __init__(self, params: nnx.State, spec: ModelSpec) -> None:
        """Take the parameters that `spec` describes.

        Raises:
          UserError: Other processes hold parts of them.
        """
        self._model, self._vocab_size = spec.merge(params), spec.config.vocab_size
        if not all(x.is_fully_addressable for x in jax.tree.leaves(params)):
            raise UserError(
                "the weights are spread over several processes; load and write them in a single one."
            )

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """See `gemma_jax.pretrained.layout.Weights`."""
        holder: Any = functools.reduce(getattr, parameter.split("."), self._model)
        if layer is not None:
            holder = jax.tree.map(lambda stack: stack[layer], holder)
        array = np.asarray(holder.dense() if isinstance(holder, Weight) else holder[...])
        return array[: self._vocab_size] if parameter == EMBEDDING else array

    def where(self, parameter: str, layer: int | None) -> str:
        """See `gemma_jax.pretrained.layout.Weights`."""
        return parameter if layer is None else f"{parameter} of layer {layer}"


class CastWeights:
    """Casts weights to a dtype (an empty one changes nothing) and checks that the results are finite."""

    def __init__(self, weights: Weights, dtype: str) -> None:
        self._weights, self._dtype = weights, np.dtype(jnp.dtype(dtype)) if dtype else None
        self.dtypes: set[str] = set()  # of the arrays returned so far

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """See `gemma_jax.pretrained.layout.Weights`.

        Raises:
          UserError: A number is NaN, infinity, or too large for the dtype.
        """
        array = self._weights.get(parameter, layer)
        with np.errstate(all="ignore"):  # non-finite numbers are checked here instead
            cast = array if self._dtype is None else array.astype(self._dtype, copy=False)
            finite, was_finite = np.isfinite(cast).all(), np.isfinite(array).all()
        if not finite:
            where = self._weights.where(parameter, layer)
            if was_finite:
                raise UserError(f"{where} holds numbers too large for {self._dtype}; choose another dtype.")
            raise UserError(f"{where} holds NaN or infinity, so the weights are damaged; copy them again.")
        self.dtypes.add(str(cast.dtype))
        return cast

    def where(self, parameter: str, layer: int | None) -> str:
        """See `gemma_jax.pretrained.layout.Weights`."""
        return self._weights.where(parameter, layer)


def export(
    destination: str | os.PathLike[str],
    form: Form,
    weights: Weights,
    config: TransformerConfig,
    *,
    dtype: str,
    end_tokens: Sequence[int],
    tokenizer: Tokenizer | None,
    terms_source: str,
    quantization: str = "",
) -> str:
    """Write weights as a directory; if anything fails, nothing is left behind.

    Args:
      destination: The directory to create; it must not exist yet, or must be empty.
      form: huggingface, flax, gguf, or run, which writes a run directory at step 0 without optimizer state.
      weights: The weights to write.
      config: The config of the model.
      dtype: float32, bfloat16 or float16. If empty, each array keeps its dtype; `run` does not allow that,
        nor float16; `gguf` allows only bfloat16.
      end_tokens: The token ids that end a generation.
      tokenizer: The tokenizer to write, or None.
      terms_source: For weights under the Gemma terms of use, their source, which the NOTICE names. If empty,
        no NOTICE is written.
      quantization: The kind of weights to write: any that `kind_of` reads for `run`, nf4 for `huggingface`,
        int8 (q8_0) or int4 (q4_0) for `gguf`; empty for dense ones.

    Returns:
      The dtypes that were written, joined for use in a message.

    Raises:
      UserError: The destination is not empty or is inside another checkpoint, the disk is full, the weights
        are not finite in this dtype, or an argument is not allowed.
    """
    own = ("",) if form != "run" else ()
    for name, value, known in (("format", form, typing.get_args(Form)), ("dtype", dtype, DTYPES + own)):
        if value not in known:
            raise UserError(f"{name} is {value!r}, but must be one of {', '.join(filter(None, known))}.")
    if "://" in os.fspath(destination):
        raise UserError(f"{destination} is no directory of this machine; give one, and copy it from there.")
    if form == "run" and dtype == "float16":
        raise UserError("a run keeps float32 or bfloat16; give one of these as dtype.")
    if form == "gguf" and (quantization not in GGUF_TYPES or dtype not in ("", "bfloat16")):
        raise UserError(
            f"format gguf is not written with dtype {dtype or 'auto'} and quantization {quantization!r}; it "
            "has bfloat16, or the quantization int8 or int4."
        )
    is_nf4 = quantization.partition(",")[0] == "nf4"
    if quantization and form not in ("run", "gguf") and not (form == "huggingface" and is_nf4):
        raise UserError(
            f"format {form} is not written with quantization {quantization}; a run takes every kind, "
            "huggingface nf4, and gguf int8 and int4."
        )
    target = Path(os.path.expanduser(destination))
    if form in ("flax", "run"):
        check_writable_path(target)
    if inside := next(filter(holds_checkpoint, Path(os.path.realpath(target)).parents), None):
        raise UserError(
            f"{destination} is inside {inside}, which holds a checkpoint; give a place outside of it."
        )
    size = sum(
        math.prod(shape) * (config.num_layers if name.startswith("blocks.") else 1)
        for name, shape in parameter_shapes(config).items()
    )
    cast = CastWeights(weights, "" if form == "gguf" else dtype)
    tuned = (tokenizer.end_of_turn_id if tokenizer else END_OF_TURN) in end_tokens
    with new_directory(target, size * jnp.dtype(dtype or "bfloat16").itemsize) as folder:
        if form == "run":
            _write_run(folder, cast, config, dtype, quantization)
        elif form == "gguf":
            kind, template = GGUF_TYPES[quantization], CHAT_TEMPLATE if tuned else ""
            write_gguf(folder / GGUF_FILE, cast, config, kind, tokenizer, template, target.name)
        else:
            if form == "huggingface":
                dtype = write_huggingface(folder, cast, config, quantised=bool(quantization))
            else:
                dtype = write_flax(folder / FLAX_FOLDER, cast, config)
            write_config(folder, config, dtype, BITSANDBYTES if quantization else None)
        dtypes = GGUF_TYPES[quantization] if form == "gguf" else " and ".join(sorted(cast.dtypes))
        write_generation_config(folder, tuple(end_tokens))
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER_FILE)
            if form == "huggingface":
                _write_tokenizer_config(folder, config, tuned)
        if terms_source:
            write_notice(folder, terms_source, dtypes)
    return dtypes


def export_adapter(destination: str | os.PathLike[str], adapter: Adapter, config: TransformerConfig) -> None:
    """Write an adapter in PEFT's files; see `export` for `destination`.

    Raises:
      UserError: The destination is not empty, or the disk is full.
    """
    size = 4 * sum(pair.a.size + pair.b.size for pair in adapter.pairs.values())
    with new_directory(Path(os.path.expanduser(destination)), size) as folder:
        write_peft(folder, adapter, config)


def _write_run(
    folder: Path, weights: Weights, config: TransformerConfig, dtype: str, quantization: str
) -> None:
    compute = replace(ComputeConfig(), {"param_dtype": dtype})
    experiment = PretrainConfig(model=config, compute=compute)
    mesh = make_mesh(MeshConfig(cpu_devices=1))
    params = place(weights, ModelSpec(config, compute, mesh, kind_of(quantization)))
    with CheckpointStore(folder, experiment.checkpoint) as store:
        position = RunRecord(step=0, rows_seen=0, config=to_dict(experiment), quantization=quantization)
        store.save(position, {"params": params})
    (folder / LOCK_FILE).unlink()
    (folder / CONFIG_FILE).write_text(to_json(experiment))


def _write_tokenizer_config(folder: Path, config: TransformerConfig, dialogues: bool) -> None:
    """Write the file that transformers needs beside tokenizer.model to build its GemmaTokenizer."""
    data: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length,
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    }
    if dialogues:
        data["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(destination: Path, size: int) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `destination` at the end, or removed after an error.

    Args:
      destination: The final name; it must not exist yet, or must be an empty directory.
      size: The approximate number of bytes that will be written.

    Raises:
      UserError: The destination is not empty, or the disk is full or cannot be written.
    """
    if os.path.exists(destination) and not (os.path.isdir(destination) and not os.listdir(destination)):
        raise UserError(f"{destination} is there already; give another destination, or remove it first.")
    unfinished = destination.absolute().with_name(f"{destination.name}.unfinished-{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
        free = shutil.disk_usage(unfinished).free
        if free < size:
            raise UserError(
                f"{destination} needs {_in_bytes(size)}, but its disk has {_in_bytes(free)} free; "
                "make room, or give another destination."
            )
        with without_echo():
            yield unfinished
        unfinished.rename(destination)
    except (OSError, ValueError) as error:
        if not (reason := storage_failure(error)):
            raise
        raise UserError(
            f"cannot write {destination} ({reason}); nothing is left of it: make room or check the disk, "
            "and give the same command again."
        ) from error
    finally:
        # After an error, orbax's threads keep writing for a moment and create the folder again.
        for _ in range(5 if os.path.exists(unfinished) else 0):
            shutil.rmtree(unfinished, ignore_errors=True)
            time.sleep(0.2)


def _in_bytes(size: int) -> str:
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB") if size >= 10**6 else (1000, "kB")
    return f"{-(-size // (unit // 10)) / 10:,g} {name}"
