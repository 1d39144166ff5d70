"""Reads and writes Gemma models as GGUF files, the form of llama.cpp.

llama.cpp stores the scales of norms plus 1, and the tokenizer with the weights.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.config import TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.pretrained.end_tokens import END_OF_TURN
from gemma_jax.pretrained.gguf_file import ROWS, GGUFFile, can_dequantize, ggml_type
from gemma_jax.pretrained.huggingface import from_stored, stored_shape, to_stored
from gemma_jax.pretrained.layout import Weights, check_tensors, in_order, parameter_shapes, widest
from gemma_jax.pretrained.published_config import described_model, shown
from gemma_jax.pretrained.tensor_file import FLOATS
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.weights import EMBEDDING, FINAL_NORM

GGUF_FILE = "model.gguf"  # the name that we give a file; any other is read too
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}
_KEYS = {
    "num_layers": "block_count",
    "embed_dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "context_length": "context_length",
}
_TEMPLATE = "tokenizer.chat_template"
_PADDING = "[PAD{}]"  # the text of a token for a row of the embedding that the tokenizer does not have
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # types of tokens, as in SentencePiece's ModelProto
# The types that we write: the type of the embedding, and the number of the whole file in general.file_type.
WRITTEN = {"bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q8_0", 2)}
_LARGEST = {"BF16": 3.38e38, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}  # the scale of a block is a float16


def tensor_name(parameter: str, layer: int | None) -> str:
    """Returns the name in a file of one of our arrays."""
    if layer is None:
        return {EMBEDDING: _EMBEDDING, FINAL_NORM: "output_norm.weight"}[parameter]
    return f"blk.{layer}.{_BLOCK_NAMES[parameter.removeprefix('blocks.')]}.weight"


class GGUFWeights:
    """The Gemma in a GGUF file. Only the header is read until an array is requested.

    A quantised one is loaded as the kind of ours that `quantized` says.
    """

    def __init__(self, path: Path) -> None:
        """Check that the file is complete and holds the model that its metadata describe.

        Raises:
          UserError: A check fails; the message names the file and the key or tensor.
        """
        self.file = GGUFFile(path)
        self.config = self._read_config()
        self._shapes = parameter_shapes(self.config)
        self._check_tensors()
        self.dtype = widest({str(stored.dtype) for stored in self.file.tensors.values()})

    @property
    def quantized(self) -> str:
        """The kind to load: empty for floating-point numbers, else int8:32, or int4 for at most 5 bits.

        The bits are the average of the numbers in the layers, each with its part of its block's scale.
        """
        tensors = self.file.tensors
        if all(stored.type in FLOATS for stored in tensors.values()):
            return ""
        linear = [stored for name, stored in tensors.items() if name[:4] == "blk." and len(stored.shape) == 2]
        numbers = sum(math.prod(stored.shape) for stored in linear)
        return "int4" if 8 * sum(stored.size for stored in linear) <= 5 * numbers else "int8:32"

    def _read_config(self) -> TransformerConfig:
        path, left = self.file.path, dict(self.file.metadata)

        def take(key: str, kind: Any, default: Any = None) -> Any:
            value = left.pop(f"gemma.{key}", default)
            if type(value) is not kind:
                problem = "is missing" if value is None else f"is {shown(value)}"
                raise UserError(
                    f"gemma.{key} {problem} in {path}, but must be of the type {kind.__name__}; "
                    "convert the model again."
                )
            # The shortest decimal number that is the same float32: 1e-06 and not 9.99999997e-07.
            return float(str(np.float32(value))) if kind is float else value

        def require(key: str, *allowed: Any, remedy: str = "convert the model again") -> None:
            if (value := left.pop(key, None)) not in allowed:
                raise UserError(
                    f"{path} has {key} {shown(value)}, but only {allowed[-1]!r} is supported; {remedy}."
                )

        require("general.architecture", "gemma", remedy="give a Gemma 1, a Gemma 1.1 or a CodeGemma")
        require("general.type", None, "model", remedy="give the file of a whole model")
        require("split.count", None, 0, 1, remedy="join all parts with `llama-gguf-split --merge`")
        embedding = self.file.tensors.get(_EMBEDDING)
        config = described_model(
            path,
            vocab_size=embedding.shape[0] if embedding and embedding.shape else 0,
            norm_epsilon=take("attention.layer_norm_rms_epsilon", float),
            rope_base=take("rope.freq_base", float, 10_000.0),
            **{field: take(key, int) for field, key in _KEYS.items()},
        )
        require("gemma.attention.value_length", None, config.head_dim)
        require("gemma.rope.dimension_count", None, config.head_dim)
        require("gemma.rope.scaling.type", None, "none")
        require("gemma.vocab_size", None, config.vocab_size)
        for key in left:
            if key.startswith("gemma."):
                raise UserError(
                    f"{path} has {shown(key)[1:-1]} {shown(left[key])}, which no Gemma 1 has; "
                    "convert the model again without it."
                )
        return config

    def _check_tensors(self) -> None:
        path, tensors = self.file.path, self.file.tensors
        for kind, name in {stored.type: name for name, stored in tensors.items()}.items():
            if kind not in FLOATS and not can_dequantize(kind):
                raise UserError(
                    f"{shown(name)} in {path} is of the type {kind}, which cannot be read; "
                    "give a file of another type, such as Q8_0 or BF16."
                )
        found = {name: (x.shape, str(x.dtype)) for name, x in tensors.items() if name != _HEAD}
        wanted = (
            (tensor_name(parameter, layer), stored_shape(parameter, self._shapes[parameter]))
            for parameter, layer in in_order(self.config)
        )
        check_tensors(found, wanted, str(path), f"its metadata, which {path.name} begins with,")
        if _HEAD in tensors:
            head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
            same = (head.shape, head.type) == (embedding.shape, embedding.type)
            if not same or not np.array_equal(self.file.raw(_HEAD), self.file.raw(_EMBEDDING)):
                raise UserError(f"{_HEAD} in {path} is not {_EMBEDDING}; in a Gemma both are one.")

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """See `gemma_jax.pretrained.layout.Weights`."""
        with np.errstate(all="ignore"):  # whoever takes an array checks that it is finite
            tensor = self.file[tensor_name(parameter, layer)]
            if tensor.ndim == 1:  # the scale of a norm, which GGUF stores plus 1
                tensor = tensor.astype(np.float32) - 1
        return from_stored(parameter, tensor, self._shapes[parameter])

    def where(self, parameter: str, layer: int | None) -> str:
        """See `gemma_jax.pretrained.layout.Weights`."""
        return f"{tensor_name(parameter, layer)} in {self.file.path}"

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file holds a tokenizer."""
        return self.file.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")

    def end_tokens(self) -> tuple[int, ...]:
        """Returns the token ids that end an answer.

        llama.cpp's converter writes <end_of_turn> for every Gemma, so it counts only beside a chat template.

        Raises:
          UserError: An id is not one of the vocabulary.
        """
        metadata = self.file.metadata
        ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        for value in ids:
            if value is not None and (type(value) is not int or not 0 <= value < self.config.vocab_size):
                raise UserError(
                    f"{self.file.path} has {shown(value)} as the id of an end token, but its vocabulary ends "
                    f"at {self.config.vocab_size - 1}; convert the model again."
                )
        tuned = _TEMPLATE in metadata
        return tuple({value for value in ids if value is not None and (tuned or value != END_OF_TURN)})

    def tokenizer(self) -> Tokenizer | None:
        """Rebuild the SentencePiece tokenizer; returns None if the file has none.

        llama.cpp's converter writes some user-defined pieces as control tokens, some with spaces in place of
        U+2581, and others as normal pieces. The latter are recognised by their score of 0; the first piece
        that is really normal has that score too, but the next one has -1.

        Raises:
          UserError: The tokenizer is not of Gemma's kind.
        """
        if not self.has_tokenizer:
            return None
        path, keys = self.file.path, ("model", "tokens", "scores", "token_type")
        kind, tokens, *numbers = (self.file.metadata.get(f"tokenizer.ggml.{key}") for key in keys)
        formats = [getattr(array, "format", None) for array in numbers]
        if kind != "llama" or not isinstance(tokens, list) or formats != ["f", "i"]:
            raise UserError(
                f"{path} has a tokenizer of the kind {shown(kind)}, without the tokens, scores or types of a "
                "Gemma's; put the model's tokenizer.model beside it."
            )
        scores, types = map(np.asarray, numbers)
        same = len(tokens) == len(scores) == len(types)
        if not (same and np.isfinite(scores).all() and np.isin(types, range(1, 7)).all()):
            raise UserError(
                f"{path} does not have a score and a known type for each of {len(tokens)} tokens; "
                "copy or download it again."
            )
        unmarked = (types == _NORMAL) & (scores == 0) & (np.append(scores[1:], 0) != -1)
        late_control = (types == _CONTROL) & (np.arange(len(types)) > Tokenizer.unk_id)
        types = np.where(unmarked | late_control, _USER_DEFINED, types)
        try:
            texts = [token.decode().replace(" ", "\u2581") for token in tokens]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} has a token that is not UTF-8; copy or download it again.") from error
        while texts and texts[-1] == _PADDING.format(len(texts) - 1):
            texts.pop()
        pieces = zip(texts, scores.tolist(), types.tolist(), strict=False)
        return Tokenizer.from_pieces(pieces, f"The tokenizer in {path}")


def write_gguf(
    path: Path,
    weights: Weights,
    config: TransformerConfig,
    kind: str,
    tokenizer: Tokenizer | None,
    chat_template: str,
    name: str,
) -> None:
    """Write a GGUF file for llama.cpp, holding only one tensor in memory at a time.

    Args:
      path: The file to write.
      weights: The weights, in any dtypes.
      config: The config of the model.
      kind: The type of the matrices, one of `WRITTEN`. With q4_0 the embedding is q8_0. Norms are float32.
      tokenizer: The tokenizer to write, or None.
      chat_template: The dialogue format of an instruction-tuned model; empty for others.
      name: The name of the model, which programs show.

    Raises:
      UserError: A matrix cannot be written as `kind`, or the tokenizer has more pieces than the model.
      OSError: The disk is full or cannot be written.
    """
    from gguf import GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES

    embedding_type, file_type = WRITTEN[kind]
    shapes = parameter_shapes(config)
    places = {tensor_name(*place): place for place in in_order(config)}
    writer = GGUFWriter(path, "gemma")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)  # of the block formats; llama.cpp requires it
    for field, key in _KEYS.items():
        writer.add_uint32(f"gemma.{key}", getattr(config, field))
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_base)
    _add_tokenizer(writer, config, tokenizer, chat_template)
    types: dict[str, str] = {}
    for tensor, (parameter, _) in places.items():
        shape = stored_shape(parameter, shapes[parameter])
        types[tensor] = "F32" if len(shape) == 1 else embedding_type if tensor == _EMBEDDING else kind.upper()
        block, size = GGML_QUANT_SIZES[ggml_type(types[tensor])]
        if shape[-1] % block:
            raise UserError(
                f"{weights.where(*places[tensor])} has rows of {shape[-1]} numbers, but {kind} needs a "
                f"multiple of {block}; write it without quantization."
            )
        nbytes = math.prod(shape) // block * size
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), nbytes, ggml_type(types[tensor]))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, (parameter, layer) in places.items():
            array = to_stored(parameter, weights.get(parameter, layer))
            writer.write_tensor_data(_encoded(array, types[tensor], weights.where(parameter, layer)))
        assert writer.fout
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()


def _encoded(array: np.ndarray, kind: str, where: str) -> np.ndarray:
    """Converts a tensor to the bytes of a type; a vector is the scale of a norm, which GGUF stores plus 1."""
    from gguf.quants import quantize

    if array.ndim == 1:
        return array.astype(np.float32) + 1
    if (largest := float(np.abs(array).max())) > _LARGEST[kind]:
        raise UserError(f"{where} holds {largest:g}, which is too large for {kind}; choose another type.")
    if kind in FLOATS:
        return np.asarray(array.astype(FLOATS[kind], copy=False), order="C").view(np.uint8)
    starts = range(0, len(array), ROWS)
    parts = [quantize(array[at : at + ROWS].astype(np.float32), ggml_type(kind)) for at in starts]
    return np.concatenate(parts)


def _add_tokenizer(
    writer: Any, config: TransformerConfig, tokenizer: Tokenizer | None, template: str
) -> None:
    """Adds the tokenizer to the metadata, in the form that llama.cpp's converter gives it."""
    writer.add_tokenizer_model("llama" if tokenizer else "none")
    if tokenizer:
        pieces = tokenizer.pieces()
        if len(pieces) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(pieces)} pieces, but the model a vocabulary of {config.vocab_size}; "
                "give the tokenizer of this model."
            )
        # llama.cpp wants a token for each row.
        missing = range(len(pieces), config.vocab_size)
        pieces += [(_PADDING.format(index), -1000.0, _UNUSED) for index in missing]
        texts, scores, types = map(list, zip(*pieces, strict=True))
        for index, text in enumerate(texts):
            if types[index] == _USER_DEFINED and tokenizer.acts_as_control(text):
                types[index] = _CONTROL  # or llama.cpp would find turn markers in what somebody typed
            elif types[index] == _USER_DEFINED:
                texts[index] = text.replace("\u2581", " ")  # llama.cpp looks for these in the text as it is
        writer.add_token_list(texts)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(False)
    for name in ("bos", "eos", "pad", "unk"):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", getattr(Tokenizer, f"{name}_id"))
    if template:
        writer.add_eot_token_id(tokenizer.end_of_turn_id if tokenizer else END_OF_TURN)
        writer.add_chat_template(template)
