"""Puts adapters over the weights of a model in memory, and makes sure that these are the right weights."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_jax.checkpoint.record import DamagedCheckpoint, RunRecord, fingerprints
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained.adapters import Adapter, Pair, stacked
from gemma_jax.sharding import Arrays, named_arrays, with_arrays
from gemma_jax.weights import EMBEDDING, NO_CONTEXT, Adapters, Dense, is_trained, parameter_table


def base_spec(spec: ModelSpec) -> ModelSpec:
    """Returns the spec of the model below the adapters; `spec` itself if it has none."""
    return dataclasses.replace(spec, kind=spec.kind.base) if isinstance(spec.kind, Adapters) else spec


def base_identity(spec: ModelSpec, params: nnx.State) -> dict[str, Any]:
    """Returns what identifies the weights below adapters, as JSON. It is the same on any mesh.

    `weights` covers the arrays as they are in memory, so its value depends on the dtype and the quantization,
    which are returned, too. The scales of quantised weights are left out, because the last bits of a sum
    depend on how the mesh splits it. `norms` covers the scales of the norms in bfloat16, which quantization
    leaves.

    Args:
      spec: The spec of the model with or without adapters.
      params: The parameters. Arrays of adapters are left out.
    """
    below = base_spec(spec)
    wanted = named_arrays(below.params)
    arrays = {name.replace(".base", "", 1): x for name, x in named_arrays(params).items()}
    arrays = {name: x for name, x in arrays.items() if name in wanted}
    codes = {name.removesuffix("codes") for name in arrays if name.endswith(".codes")}
    arrays = {
        n: x for n, x in arrays.items() if n.endswith(".codes") or n.rpartition(".")[0] + "." not in codes
    }
    norms = {name: x.astype(jnp.bfloat16) for name, x in arrays.items() if name.endswith("_norm")}

    def digest(arrays: Arrays) -> str:
        prints = sorted((name, int(x)) for name, x in jax.device_get(fingerprints(arrays)).items())
        return hashlib.sha256(repr(prints).encode()).hexdigest()[:32]

    about = {"weights": digest(arrays), "norms": digest(norms), "dtype": spec.compute.param_dtype}
    return about | {"kind": "dense" if below.kind is Dense else str(below.kind)}


def is_same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities can be those of the same weights. What is unknown is not compared."""
    same_form = all(one.get(name) == other.get(name) for name in ("dtype", "kind"))
    compared = [
        name for name in ("norms", "weights" if same_form else "norms") if name in one and name in other
    ]
    return all(one[name] == other[name] for name in compared)


def run_adapter(folder: epath.Path, record: RunRecord, name: str) -> Adapter:
    """Reads the adapter that a run has trained.

    Args:
      folder: The checkpoint of one step.
      record: Its record, whose `base` says what is below the adapter.
      name: What the user calls it.

    Raises:
      UserError: The checkpoint is damaged, or its base is not described.
    """
    from gemma_jax.checkpoint.restore import load_arrays  # late: importing orbax takes a second

    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype), sharding=here)
        for name, x in record.arrays["params"].items()
    }
    arrays = {
        name: np.asarray(x) for name, x in load_arrays(folder, {"params": abstract}, record)["params"].items()
    }
    try:
        base, scale = str(record.base["name"]), float(record.base["scale"])
        identity, ids = dict(record.base["identity"]), list(record.base["rows"])
        rows = dict(zip(ids, arrays.get(f"{EMBEDDING}.rows", np.zeros((1, 0)))[0], strict=True))
        pairs = {
            (parameter, layer): Pair(a[0], b[0], scale)
            for parameter in (name.removesuffix(".a") for name in arrays if name.endswith(".a"))
            for layer, (a, b) in enumerate(
                zip(arrays[f"{parameter}.a"], arrays[f"{parameter}.b"], strict=True)
            )
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(folder, f"its record does not describe its adapter ({error})") from error
    return Adapter(name, pairs, rows, base, identity)


def with_adapters(
    spec: ModelSpec, base: nnx.State, adapters: Sequence[Adapter]
) -> tuple[ModelSpec, nnx.State]:
    """Puts adapters over a model, to be chosen by `Context.adapters`; returns the new spec and parameters.

    Raises:
      UserError: An adapter belongs to other weights.
    """
    identity = base_identity(spec, base) if any(adapter.identity for adapter in adapters) else {}
    for adapter in adapters:
        if not is_same_base(adapter.identity, identity):
            raise UserError(
                f"{adapter.name} was trained on {adapter.base}, and these weights are others or have changed "
                "since; give the checkpoint that it was trained on."
            )
    rank, targets, ids, arrays = stacked(adapters, spec.config)
    kind = Adapters(rank, count=len(adapters), targets=targets, base=spec.kind, rows=ids)
    spec = dataclasses.replace(spec, kind=kind)
    if ids:
        own = _embeddings(spec, base, ids)
        rows = [[adapter.rows.get(token, own[i]) for i, token in enumerate(ids)] for adapter in adapters]
        arrays[f"{EMBEDDING}.rows"] = np.array(rows, np.float32)
    return spec, over_base(spec, base, arrays)


def begin_adapters(spec: ModelSpec, base: nnx.State, seed: int, start: Adapter | None) -> nnx.State:
    """Returns the parameters with which training begins: new adapters over `base`, or those of `start`.

    Raises:
      UserError: `start` has another rank, scale, projections or rows of the embedding.
    """
    kind = spec.kind
    assert isinstance(kind, Adapters)
    names = [name for name in named_arrays(spec.params) if is_trained(name)]
    if start is None:
        create = jax.jit(functools.partial(spec.create, names=names))
        arrays = {name: np.asarray(x) for name, x in create(jax.random.key(seed)).items()}
        if kind.rows:
            arrays[f"{EMBEDDING}.rows"] = _embeddings(spec, base, kind.rows)[None]
    else:
        rank, targets, ids, arrays = stacked([start], spec.config)
        has = {"rank": rank, "targets": tuple(sorted(targets)), "embedding_rows": ids}
        asked = {"rank": kind.rank, "targets": kind.targets, "embedding_rows": kind.rows}
        scales = {pair.scale for pair in start.pairs.values()}
        has["scale"], asked["scale"] = max(scales), kind.scale
        for name, value in has.items():
            if value != asked[name] or len(scales) > 1:
                raise UserError(
                    f"{start.name} has the {name} {value}, and lora asks for {asked[name]}; "
                    "set lora as it was there."
                )
        arrays = {name: x / kind.scale if name.endswith(".b") else x for name, x in arrays.items()}
        if ids:
            arrays[f"{EMBEDDING}.rows"] = np.array([[start.rows[token] for token in ids]], np.float32)
    for name in names if kind.reference else ():
        head, _, last = name.rpartition(".")
        arrays[f"{head}.reference_{last}"] = arrays[name]
    return over_base(spec, base, arrays)


def over_base(spec: ModelSpec, base: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """Returns the parameters of a model with adapters: those of the base, and `arrays` by name."""
    kind, table = spec.kind, parameter_table(spec.config)
    assert isinstance(kind, Adapters)
    abstract = named_arrays(spec.params)
    placed: Arrays = {name: jax.device_put(x, abstract[name].sharding) for name, x in arrays.items()}
    for name, x in named_arrays(base).items():
        parameter = next(p for p in table if name == p or name.startswith(f"{p}."))
        placed[f"{parameter}.base{name[len(parameter) :]}" if kind.adapts(table[parameter]) else name] = x
    return with_arrays(spec.params, placed)


def _embeddings(spec: ModelSpec, base: nnx.State, ids: Sequence[int]) -> np.ndarray:
    """Returns the embedding of some tokens, [n, D] float32."""
    below = base_spec(spec)

    def rows(base: nnx.State) -> jax.Array:
        return below.merge(base).embedding.embedding_lookup(jnp.asarray(ids)[None], jnp.float32, NO_CONTEXT)[
            0
        ]

    everywhere = NamedSharding(spec.mesh, PartitionSpec())
    return np.asarray(jax.jit(rows, out_shardings=everywhere)(base))
