"""Adapters in the files of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

The files are untrusted. A key of adapter_config.json that would change what the adapter computes, and is not
supported, is refused by name. Every tensor must belong to a module that the config targets, and each of these
must have its tensors.
"""

import collections
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.config import TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.pretrained.adapters import Adapter, Pair
from gemma_jax.pretrained.huggingface import from_stored, tensor_name, to_stored
from gemma_jax.pretrained.layout import check_tensors, in_order
from gemma_jax.pretrained.published_config import read_object, shown
from gemma_jax.pretrained.safetensors import SafetensorsFile, write_safetensors
from gemma_jax.weights import parameter_table

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MOST_RANK = 4096
MOST_NAMES = 2000  # in one list or pattern of a config; the largest Gemma has 196 matrices that can be named
MATCHING_SECONDS = 10.0  # for all regular expressions of a config, some of which would take for ever
_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_ROWS = f"{_PREFIX}{_EMBEDDING}.token_adapter.trainable_tokens_delta"

# Keys that have no effect on what an adapter computes: where it comes from, and how it was trained. The
# settings of a method of initialisation are among them; the method itself is not.
_WITHOUT_EFFECT = (
    "auto_mapping corda_config ensure_weight_tying eva_config inference_mode loftq_config lora_dropout "
    "lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config"
)
# Allowed values of other keys that are not read. Of those not listed here only null and false are allowed,
# the defaults of nearly all keys. The methods of initialisation pissa, olora, corda, loftq and lora_ga are
# not allowed, because they change the base weights too.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "mica"),
}
# Runs in a process of its own, because nothing else can stop a regular expression that takes too long.
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    print(json.dumps([name for name in names if re.fullmatch(pattern, name)]), flush=True)
"""


def _modules(config: TransformerConfig) -> dict[str, tuple[str, int]]:
    """Returns the parameter and layer of each module that can have an adapter, by its name in the files."""
    table = parameter_table(config)
    return {
        tensor_name(parameter, layer).removesuffix(".weight"): (parameter, layer)
        for parameter, layer in in_order(config)
        if layer is not None and table[parameter].inputs
    }


def _factor(module: str, letter: str) -> str:
    """Returns the name in the files of the matrix A or B of a module."""
    return f"{_PREFIX}{module}.lora_{letter}.weight"


def _matches(patterns: Iterable[str], names: Iterable[str], path: Path) -> dict[str, set[str]]:
    """Returns the names that each regular expression matches as a whole."""
    wanted = list(dict.fromkeys(patterns))
    if not wanted:
        return {}
    command, text = [sys.executable, "-I", "-S", "-c", _MATCH], json.dumps([wanted, list(names)])
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=MATCHING_SECONDS)
        lines, failed = done.stdout.splitlines(), done.returncode != 0
    except subprocess.TimeoutExpired as error:
        lines, failed = (error.stdout or b"").splitlines(), True
    if failed:
        raise UserError(
            f"{path} has the pattern {shown(wanted[min(len(lines), len(wanted) - 1)])}, which is no regular "
            f"expression or takes more than {MATCHING_SECONDS:g} seconds; list the names of modules instead."
        )
    return {pattern: set(json.loads(line)) for pattern, line in zip(wanted, lines, strict=True)}


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_NAMES and all(isinstance(n, str) for n in value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_RANK


class _Config:
    """An adapter_config.json, with every value checked."""

    def __init__(self, path: Path, config: TransformerConfig) -> None:
        self._path, self._data, self._modules = path, read_object(path), _modules(config)
        self._targets = self._names("target_modules", ["q_proj", "v_proj"])
        self._excluded = self._names("exclude_modules", [])
        layers = self._value(
            "layers_to_transform",
            [],
            lambda v: isinstance(self._targets, list) and all(type(n) is int for n in _listed(v)),
            "a layer or a list of layers, beside target_modules that are a list",
        )
        self._layers = _listed(layers)
        # The place of the layers; without layers_to_transform it has no effect.
        self._of_layers = [
            rf"(?:^|.*?\.){text}\.\d+\..*" for text in _listed(self._names("layers_pattern", []))
        ]
        rank, number = f"a whole number from 1 to {MOST_RANK}", "a number of at most a million"
        self._rank = self._value("r", 8, _is_rank, rank)
        self._alpha = self._value("lora_alpha", 8, _is_number, number)
        self._ranks = self._pattern("rank_pattern", _is_rank, rank)
        self._alphas = self._pattern("alpha_pattern", _is_number, number)
        self._root = self._value("use_rslora", False, lambda v: isinstance(v, bool), "true or false")
        self.base = self._value("base_model_name_or_path", "", lambda v: isinstance(v, str), "a name")
        self.tokens = self._tokens(config.vocab_size)
        for key, value in {"peft_type": None, **self._data}.items():
            if key not in _WITHOUT_EFFECT.split() and value not in _ALLOWED.get(key, (None, False)):
                raise UserError(
                    f"{path} has {shown(key)[1:-1]} {shown(value)}, which is not supported; give a LoRA "
                    "adapter that was made without it."
                )
        regular = [text for text in (self._targets, self._excluded) if isinstance(text, str)]
        regular += [*self._of_layers, *self._ranks, *self._alphas]
        self._matched = _matches(regular, [*self._modules, _EMBEDDING, _HEAD], path)

    def _value(self, key: str, default: Any, valid: Callable[[Any], bool], wanted: str) -> Any:
        """Takes a value that must be valid, or null or absent for its default."""
        value = self._data.pop(key, None)
        if value is None:
            return default
        if not valid(value):
            raise UserError(f"{self._path} has {key} {shown(value)}, but it must be {wanted}.")
        return value

    def _names(self, key: str, default: list[str]) -> Any:
        """Takes a regular expression or a list of names."""
        wanted = f"a text or a list of at most {MOST_NAMES} texts"
        return self._value(key, default, lambda v: isinstance(v, str) or _is_names(v), wanted)

    def _pattern(self, key: str, valid: Callable[[Any], bool], wanted: str) -> dict[str, Any]:
        """Takes a value for each of several names or regular expressions, which PEFT extends at both ends."""
        found = self._value(
            key,
            {},
            lambda v: isinstance(v, dict) and _is_names([*v]) and all(map(valid, v.values())),
            f"an object with {wanted} for each of at most {MOST_NAMES} names",
        )
        return {rf"(.*\.)?({text})$": value for text, value in found.items()}

    def _tokens(self, vocab_size: int) -> list[int]:
        """Takes the tokens whose rows of the embedding are trained, in the order of the tensor."""
        value = ids = self._data.pop("trainable_token_indices", None) or []
        if isinstance(value, dict):  # the head is the embedding, so it may be named too
            lists = list(value.values())
            named = value.keys() <= {"embed_tokens", _EMBEDDING, _HEAD} and value.keys() != {_HEAD}
            ids = lists[0] if named and lists.count(lists[0]) == len(lists) else None
        valid = isinstance(ids, list) and all(type(n) is int and 0 <= n < vocab_size for n in ids)
        if not valid or len(set(ids)) < len(ids):
            raise UserError(
                f"{self._path} has trainable_token_indices {shown(value)}, but it must be different ids of "
                f"tokens of embed_tokens, below {vocab_size}."
            )
        return ids

    def _in(self, names: str | list[str], name: str) -> bool:
        """Whether a name matches a regular expression, or is in a list or ends in one of its names."""
        if isinstance(names, str):
            return name in self._matched[names]
        return any(name == text or name.endswith(f".{text}") for text in names)

    def _is_target(self, name: str) -> bool:
        if self._in(self._excluded, name):
            return False
        layer = self._modules.get(name, ("", None))[1]
        if isinstance(self._targets, str) and self._targets.lower() == "all-linear":
            return layer is not None
        if self._layers and name not in self._targets:  # a whole name is a target in any layer
            of_layers = not self._of_layers or any(name in self._matched[text] for text in self._of_layers)
            return layer in self._layers and of_layers and self._in(self._targets, name)
        return self._in(self._targets, name)

    def _of(self, patterns: dict[str, Any], name: str, default: Any) -> Any:
        return next((value for text, value in patterns.items() if name in self._matched[text]), default)

    def targets(self) -> dict[str, tuple[int, float]]:
        """Returns the rank and the scale of each module that has an adapter, by name.

        Raises:
          UserError: it targets the embedding, or nothing.
        """
        found = {}
        for name in filter(self._is_target, [*self._modules, _EMBEDDING, _HEAD]):
            if name not in self._modules:
                raise UserError(
                    f"{self._path} has target_modules {shown(self._targets)}, but {name} can have no adapter "
                    "here; give one of the attention and the feed-forward, or with trainable_token_indices."
                )
            rank, alpha = self._of(self._ranks, name, self._rank), self._of(self._alphas, name, self._alpha)
            found[name] = (rank, alpha / (math.sqrt(rank) if self._root else rank))
        if not found and not self.tokens:
            raise UserError(
                f"{self._path} has target_modules {shown(self._targets)}, which match no module of this "
                "model; give an adapter of this model."
            )
        return found


def read_peft(folder: Path, config: TransformerConfig) -> Adapter:
    """Reads an adapter that PEFT has saved.

    Args:
      folder: The folder with adapter_config.json and adapter_model.safetensors.
      config: The config of the model that it is for.

    Raises:
      UserError: a file is missing, damaged or too large, the config has a key or value that is not supported,
        or the tensors are not those of this config and model; the message names the file and the tensor.
    """
    path, settings, modules = folder / WEIGHTS_FILE, _Config(folder / CONFIG_FILE, config), _modules(config)
    if not os.path.lexists(path):
        raise UserError(
            f"{folder} has no {WEIGHTS_FILE}; save the adapter as safetensors (a pickled .bin is not read)."
        )
    file, table, targets = SafetensorsFile(path), parameter_table(config), settings.targets()
    shapes = {_ROWS: (len(settings.tokens), config.embed_dim)} if settings.tokens else {}
    for name, (rank, _) in targets.items():
        about = table[modules[name][0]]
        shapes[_factor(name, "A")] = (rank, math.prod(about.shape[: about.inputs]))
        shapes[_factor(name, "B")] = (math.prod(about.shape[about.inputs :]), rank)
    found = {name: (stored.shape, str(stored.dtype)) for name, stored in file.tensors.items()}
    check_tensors(found, shapes.items(), str(path), f"{folder / CONFIG_FILE} for this model")

    def tensor(name: str) -> np.ndarray:
        file.check(name)
        array = file[name].astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{name} in {path} holds NaN or infinity; copy or train the adapter again.")
        return array

    pairs = {}
    for name, (rank, scale) in targets.items():
        about = table[modules[name][0]]
        a = from_stored(about.name, tensor(_factor(name, "A")), (*about.shape[: about.inputs], rank))
        b = tensor(_factor(name, "B")).T.reshape(rank, *about.shape[about.inputs :])
        pairs[modules[name]] = Pair(a, b, scale)
    rows = dict(zip(settings.tokens, tensor(_ROWS), strict=True)) if settings.tokens else {}
    return Adapter(str(folder), pairs, rows, settings.base)


def write_peft(folder: Path, adapter: Adapter, config: TransformerConfig) -> None:
    """Writes an adapter as PEFT does, in float32.

    Args:
      folder: An existing folder.
      adapter: The adapter.
      config: The config of its model.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    pairs, tensors = {}, {}
    for name, key in _modules(config).items():
        if pair := adapter.pairs.get(key):
            pairs[name] = pair
            tensors[_factor(name, "A")] = to_stored(key[0], pair.a)
            tensors[_factor(name, "B")] = pair.b.reshape(pair.rank, -1).T
    tokens = sorted(adapter.rows)
    if tokens:
        tensors[_ROWS] = np.stack([adapter.rows[token] for token in tokens])
    rank, ranks = _common({name: pair.rank for name, pair in pairs.items()})
    alpha, alphas = _common({name: pair.scale * pair.rank for name, pair in pairs.items()})
    short = sorted({name.rpartition(".")[2] for name in pairs})
    data = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": short if len(pairs) == len(short) * config.num_layers else list(pairs),
        "trainable_token_indices": tokens or None,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n")
    shapes = {name: array.shape for name, array in tensors.items()}
    write_safetensors(folder / WEIGHTS_FILE, shapes, lambda name: tensors[name].astype(np.float32))


def _common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the most common value, and the others by name."""
    common = collections.Counter(values.values()).most_common(1)[0][0] if values else 8
    return common, {name: value for name, value in values.items() if value != common}
