"""Resolves the CHECKPOINT argument of the commands and of `Gemma.from_pretrained`.

It can be a run directory, one of its steps, a Hugging Face directory, a published Flax directory, a GGUF
file, a name on the Hugging Face Hub or on Kaggle, or `random:PRESET`.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from flax import nnx

from gemma_jax.checkpoint.folders import STEPS_FOLDER
from gemma_jax.checkpoint.record import run_record
from gemma_jax.config import ComputeConfig, TransformerConfig, from_record, preset, replace, validate_model
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.paths import SMALL_FILE, open_regular
from gemma_jax.pretrained.adapted import run_adapter
from gemma_jax.pretrained.adapters import Adapter
from gemma_jax.pretrained.end_tokens import end_tokens
from gemma_jax.pretrained.gguf import GGUF_FILE, GGUFWeights
from gemma_jax.pretrained.hub import download, is_hub_name
from gemma_jax.pretrained.huggingface import INDEX_FILE, WEIGHTS_FILE, HuggingFaceDirectory
from gemma_jax.pretrained.layout import Weights
from gemma_jax.pretrained.peft import CONFIG_FILE as ADAPTER_FILE
from gemma_jax.pretrained.peft import read_peft
from gemma_jax.pretrained.placement import place
from gemma_jax.pretrained.published_config import CONFIG_FILE, read_config, read_object
from gemma_jax.pretrained.terms import PUBLISHED_SHAPES, has_notice
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.weights import FINAL_NORM, Kind, kind_of

RANDOM = "random:"
TOKENIZER_FILE = "tokenizer.model"
GGUF = ".gguf"
RUN_RECORD = "run/data.json"  # in the folder of a step of a run; see record.py
FLAX_METADATA = "_METADATA"  # written by orbax in the directory of the arrays


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and checked, but whose weights have not been read yet."""

    name: str  # as the user gave it
    folder: str  # its directory, which may hold more files beside the weights; empty if there is none
    config: TransformerConfig
    dtype: str  # of the weights on disk; the widest if there are several
    tokenizer_path: str  # a tokenizer.model, or a GGUF file that holds a tokenizer; empty if there is none
    terms_source: (
        str  # what a NOTICE names as the source of weights under Google's terms; empty if there is none
    )
    params: Callable[[ModelSpec], nnx.State]
    """Reads the parameters onto the mesh; raises UserError if they are damaged or do not fit into memory."""

    weights: Weights | None = None  # the arrays on disk; only for published forms
    quantization: str = ""  # the kind of the stored weights, as `Quantization.parse` reads it; empty: dense
    adapter: Callable[[], Adapter] | None = None
    """Reads the adapter that belongs over the weights, where the checkpoint is one."""
    trained_on: str = ""  # the kind to which the weights were quantised when that adapter was trained
    stored_ends: tuple[int, ...] = ()  # ids that end an answer, which a run or a GGUF file lists

    def kind(self, quantization: str = "") -> Kind:
        """Returns the kind of weights to load: as they are stored, or quantised while they are loaded.

        Raises:
          UserError: They are quantised already, or the quantisation is unknown.
        """
        if quantization and self.quantization:
            raise UserError(
                f"{self.name} is quantised already, as {self.quantization}; leave out quantization "
                f"{quantization}, or give the original weights."
            )
        return kind_of(quantization or self.quantization or self.trained_on)

    def compute(self, given: ComputeConfig) -> ComputeConfig:
        """Returns how to execute the model, in which the dtype of the parameters is no longer auto."""
        dtype = "bfloat16" if self.dtype == "bfloat16" else "float32"
        return replace(given, {"param_dtype": dtype} if given.param_dtype == "auto" else {})

    def tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer; returns None if the checkpoint has none.

        Raises:
          UserError: The file is not a tokenizer of Gemma's kind.
        """
        if isinstance(self.weights, GGUFWeights) and self.tokenizer_path.endswith(GGUF):
            return self.weights.tokenizer()
        return Tokenizer.load(self.tokenizer_path) if self.tokenizer_path else None

    def end_tokens(self, instruction_tuned: bool | None = None) -> tuple[int, ...]:
        """Returns the token ids that end an answer; see `pretrained.end_tokens`.

        Raises:
          UserError: An id is outside the vocabulary, or `pretrained.end_tokens` raises it.
        """
        ids = end_tokens(self.name, self.folder, instruction_tuned=instruction_tuned, stored=self.stored_ends)
        if max(ids) >= self.config.vocab_size:
            raise UserError(
                f"{self.folder} has {max(ids)} as eos_token_id, but its vocabulary ends at "
                f"{self.config.vocab_size - 1}; correct its generation_config.json or config.json."
            )
        return ids


def open_checkpoint(name: str | os.PathLike[str], *, below: str = "") -> Checkpoint:
    """Find a checkpoint and check everything that can be checked without reading its weights.

    Args:
      name: A run directory (which stands for its newest step), one of its steps, a Hugging Face directory, a
        published Flax directory or the one that holds it beside its tokenizer, a GGUF file or the directory
        that holds only one, a name on the Hub (google/gemma-2b-it, or with @REVISION) or on Kaggle
        (google/gemma/flax/2b-it), or `random:PRESET` for random weights of a preset. An adapter, of a run or
        in PEFT's files, stands for the model that it was trained on, with the adapter.
      below: The adapter for which this is the model, which therefore must be no adapter; or empty.

    Raises:
      UserError: The name does not lead to a complete checkpoint of a supported Gemma.
    """
    name = os.fspath(name)
    if name.startswith(RANDOM):
        return _random(name)
    folder = Path(os.path.expanduser(name))
    refuse_others(name, folder)
    if not os.path.exists(folder) and is_hub_name(name):
        folder = download(name)
    if is_adapter(folder):
        found = _below(name, read_object(folder / ADAPTER_FILE).get("base_model_name_or_path"), below)
        return dataclasses.replace(found, name=name, adapter=lambda: read_peft(folder, found.config))
    return _published(name, folder) if is_published(folder) else _run(name, below)


def whole_name(name: str) -> str:
    """Returns the name of a checkpoint as it is understood in any working directory."""
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def open_adapter(name: str | os.PathLike[str], config: TransformerConfig) -> Adapter:
    """Read an adapter for a model with this config.

    Args:
      name: A run that has trained adapters, one of its steps, a PEFT directory, or a name on the Hub.
      config: The config of the model.

    Raises:
      UserError: There is no adapter, it is damaged, or it is for another model.
    """
    from gemma_jax.checkpoint.restore import step_folder  # late: importing orbax takes a second

    name = os.fspath(name)
    folder = Path(os.path.expanduser(name))
    if not os.path.exists(folder) and is_hub_name(name):
        folder = download(name)
    if is_adapter(folder):
        return read_peft(folder, config)
    step, _ = step_folder(folder)
    record = run_record(step)
    if not record.base:
        raise UserError(f"{name} is a whole model, not an adapter; load it as the checkpoint.")
    if from_record(record.config, str(step)).model != config:
        raise UserError(f"the adapter {name} belongs to a model of another shape; give one of this model.")
    return run_adapter(step, record, name)


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter in PEFT's files and no model."""
    model = any(os.path.lexists(folder / file) for file in (WEIGHTS_FILE, INDEX_FILE, FLAX_METADATA))
    return os.path.lexists(folder / ADAPTER_FILE) and not model


def _below(name: str, base: object, below: str) -> Checkpoint:
    """Opens the checkpoint that the adapter `name` was trained on; `below` as for `open_checkpoint`."""
    if below:
        raise UserError(
            f"{below} names the adapter {name} as its model; merge that one into its model first."
        )
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{name} does not say which model it adapts; give the model, and this as its adapter."
        )
    try:
        return open_checkpoint(base, below=name)
    except UserError as error:
        raise UserError(f"the adapter {name} needs the model that it was trained on: {error}") from error


def refuse_others(name: str, path: Path) -> None:
    """Refuse a path that exists but cannot be a checkpoint.

    Raises:
      UserError: The path is, for example, a single file of weights.
    """
    if os.path.isfile(path) and path.suffix in (".safetensors", ".json", ".model"):
        raise UserError(f"{name} is a file of a checkpoint; give the directory that holds it, {path.parent}.")
    if os.path.lexists(path) and not os.path.isdir(path) and path.suffix != GGUF:
        raise UserError(f"{name} is no directory, so it holds no checkpoint; give one that does.")


def require_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a checkpoint, whose weights are not read or created.

    Raises:
      UserError: It has no tokenizer, or `open_checkpoint` raises it.
    """
    if tokenizer := open_checkpoint(name).tokenizer():
        return tokenizer
    raise UserError(
        f"{name} has no tokenizer.model beside it, so it can be given no text; "
        "Gemma.generate in Python takes token ids."
    )


def _random(name: str) -> Checkpoint:
    config = preset(name.removeprefix(RANDOM))
    return Checkpoint(name, "", config, "float32", "", "", lambda spec: spec.init(seed=0))


def is_published(folder: str | os.PathLike[str]) -> bool:
    """Whether a path is a GGUF file or a directory of published weights, complete or not, and not a run."""
    folder = Path(folder)
    if folder.suffix == GGUF and os.path.lexists(folder) and not os.path.isdir(folder):
        return True
    if not os.path.isdir(folder) or os.path.exists(folder / RUN_RECORD):
        return False
    if _has_safetensors(folder):
        return True
    config = folder / CONFIG_FILE
    # A run has a config.json too, of another kind. A file that is not text is reported elsewhere.
    if os.path.isfile(config):
        with open_regular(config) as file:
            if b'"model_type"' in file.read(SMALL_FILE):
                return True
    return flax_folder(folder) is not None or gguf_file(folder) is not None


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder itself is a run, a step of a run, or a directory of published weights."""
    is_run = os.path.isdir(folder / STEPS_FOLDER) and os.path.exists(folder / CONFIG_FILE)
    marks = (RUN_RECORD, FLAX_METADATA, GGUF_FILE)
    return is_run or _has_safetensors(folder) or any(os.path.exists(folder / mark) for mark in marks)


def _has_safetensors(folder: Path) -> bool:
    return any(path.name.endswith((".safetensors", INDEX_FILE)) for path in folder.glob("*.safetensors*"))


def flax_folder(folder: Path) -> Path | None:
    """Returns the folder with the arrays of a Flax directory, or None if there is none.

    It is the directory itself or the only child with such arrays, beside the tokenizer.

    Raises:
      UserError: Several children hold arrays.
    """
    if os.path.lexists(folder / FLAX_METADATA):
        return folder
    found = sorted(path for path in folder.glob("*") if os.path.lexists(path / FLAX_METADATA))
    if len(found) > 1:
        names = ", ".join(child.name for child in found)
        raise UserError(f"{folder} holds several Flax checkpoints ({names}); give the path of one.")
    return found[0] if found else None


def gguf_file(path: Path) -> Path | None:
    """Returns a path of a GGUF file, or the only such file in a directory; None if there is none.

    Raises:
      UserError: The directory holds several.
    """
    found = sorted(path.glob(f"*{GGUF}")) if os.path.isdir(path) else [path]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path} holds several GGUF files ({names}); give the path of one.")
    return found[0] if found else None


def _published(name: str, folder: Path) -> Checkpoint:
    has_safetensors = _has_safetensors(folder)
    arrays = None if has_safetensors else flax_folder(folder)
    weights: Weights
    quantization, tokenizer = "", folder / TOKENIZER_FILE
    if not has_safetensors and arrays is None and (file := gguf_file(folder)):
        gguf = GGUFWeights(file)
        weights, config, dtype, quantization = gguf, gguf.config, gguf.dtype, gguf.quantized
        folder, tokenizer = file.parent, file.parent / TOKENIZER_FILE
        if not os.path.lexists(tokenizer) and gguf.has_tokenizer:
            tokenizer = file
    elif arrays is None:
        huggingface = HuggingFaceDirectory(folder)
        weights, config, dtype = huggingface, huggingface.config, huggingface.dtype
        quantization = huggingface.quantization
    else:
        from gemma_jax.pretrained.flax import FlaxDirectory  # late: importing orbax takes a second

        # The user named the folder of the arrays: the tokenizer and config.json are in its parent.
        if arrays == folder and not os.path.lexists(tokenizer):
            folder, tokenizer = folder.parent, folder.parent / TOKENIZER_FILE
        described = folder / CONFIG_FILE
        known = read_config(described) if os.path.lexists(described) else None
        size = Tokenizer.load(tokenizer).vocab_size if known is None and os.path.lexists(tokenizer) else None
        flax = FlaxDirectory(arrays, known, size)
        weights, config, dtype = flax, flax.config, flax.dtype
    # A model with additional tokens is derived from Google's weights too.
    shape = replace(config, {"vocab_size": 256_000})
    named = name.startswith("google/") or "models--google--" in os.path.abspath(folder)
    from_google = named or has_notice(folder) or shape in PUBLISHED_SHAPES
    return Checkpoint(
        name,
        str(folder),
        config,
        dtype,
        str(tokenizer) if os.path.lexists(tokenizer) else "",
        name if from_google else "",
        lambda spec: place(weights, spec),
        weights,
        quantization,
        stored_ends=weights.end_tokens() if isinstance(weights, GGUFWeights) else (),
    )


def _run(name: str, below: str) -> Checkpoint:
    from gemma_jax.checkpoint.restore import load_params, step_folder  # late: importing orbax takes a second

    folder, run_dir = step_folder(name)
    record = run_record(folder)
    config = from_record(record.config, str(folder)).model
    validate_model(config)

    tokenizer = run_dir / TOKENIZER_FILE
    if record.base:
        found = _below(name, record.base.get("name"), below)
        return dataclasses.replace(
            found,
            name=name,
            folder=str(run_dir),
            tokenizer_path=str(tokenizer) if tokenizer.exists() else found.tokenizer_path,
            adapter=lambda: open_adapter(folder, found.config),
            trained_on=record.quantization,
            stored_ends=(*found.end_tokens(), *record.end_tokens),
        )
    return Checkpoint(
        name,
        str(run_dir),
        config,
        record.arrays["params"][FINAL_NORM].dtype,  # the embedding may be quantised
        str(tokenizer) if tokenizer.exists() else "",
        name if has_notice(run_dir) else "",
        lambda spec: load_params(folder, record, spec),
        quantization=record.quantization,
        stored_ends=tuple(record.end_tokens),
    )
