"""`gemma convert SOURCE DESTINATION --format FORMAT`: converts a checkpoint to another format."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_jax.config import ComputeConfig, ConvertConfig, MeshConfig, read_command
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from gemma_jax.pretrained.adapters import Adapter
    from gemma_jax.pretrained.checkpoint import Checkpoint
    from gemma_jax.pretrained.layout import Weights


def run(arguments: Sequence[str], prog: str) -> int:
    """Write the checkpoint SOURCE to the directory DESTINATION. If this fails, nothing of it is left."""
    (source, destination), config = read_command(arguments, prog, "SOURCE DESTINATION", ConvertConfig())

    from gemma_jax.pretrained.checkpoint import open_checkpoint
    from gemma_jax.pretrained.export import export, export_adapter
    from gemma_jax.weights import kind_of

    found = open_checkpoint(source)
    if config.format == "peft":
        if found.adapter is None:
            raise UserError(f"{source} is a whole model, and format peft is for adapters; choose another.")
        adapter = found.adapter()
        export_adapter(destination, adapter, found.config)
        print(f"{destination}: peft, an adapter of {adapter.base}")
        return 0
    if found.adapter is None and (config.merge or config.merge_onto):
        raise UserError(f"{source} is a whole model, so there is no adapter to merge; leave out merge.")
    if found.adapter and not (config.merge or config.merge_onto):
        raise UserError(
            f"{source} is an adapter; add --merge to write the whole model, or --format peft for the adapter."
        )
    dtype: str = "" if config.dtype == "auto" else config.dtype
    if config.format == "run" and not dtype:
        # A run has one dtype, so use the widest. It cannot be float16; float32 holds every float16 number.
        dtype = "float32" if found.dtype == "float16" else found.dtype
    if not found.adapter:
        found.kind(config.quantization)  # refuses what is quantised already
    weights = found.weights
    if found.adapter:
        weights = _merged(found, found.adapter(), config.merge_onto)
        if config.format != "gguf":  # which has dtypes of its own
            dtype = dtype or ("bfloat16" if found.dtype == "bfloat16" else "float32")
    elif weights is None:  # a run
        weights = _placed(found, found.dtype)[1]
    terms_source = {"auto": found.terms_source, "yes": source, "no": ""}[config.gemma_terms]
    written = export(
        destination,
        config.format,
        weights,
        found.config,
        dtype=dtype,
        end_tokens=found.end_tokens(),
        tokenizer=found.tokenizer(),
        terms_source=terms_source,
        quantization=config.quantization and str(kind_of(config.quantization)),
    )
    notice = ", with a NOTICE on the Gemma terms of use" if terms_source else ""
    widest = " (a run has one dtype, so the widest)" * ((config.format, config.dtype) == ("run", "auto"))
    quantised = f" quantised as {config.quantization}" if config.quantization else ""
    print(f"{destination}: {config.format}{quantised}, {written}{widest}{notice}")
    return 0


def _placed(found: "Checkpoint", dtype: str) -> "tuple[dict[str, Any], Weights]":
    """Loads weights onto a CPU device; returns what identifies them, and the weights, dequantised."""
    from gemma_jax.model import ModelSpec
    from gemma_jax.pretrained.adapted import base_identity
    from gemma_jax.pretrained.export import PlacedWeights
    from gemma_jax.sharding import make_mesh

    compute = ComputeConfig(param_dtype="bfloat16" if dtype == "bfloat16" else "float32")
    spec = ModelSpec(found.config, compute, make_mesh(MeshConfig(cpu_devices=1)), found.kind())
    params = found.params(spec)
    return base_identity(spec, params) if found.adapter else {}, PlacedWeights(params, spec)


def _merged(found: "Checkpoint", adapter: "Adapter", onto: str) -> "Weights":
    """Returns the weights below an adapter, or those of another checkpoint, with the adapter merged."""
    from gemma_jax.pretrained.adapted import is_same_base
    from gemma_jax.pretrained.adapters import MergedWeights
    from gemma_jax.pretrained.checkpoint import open_checkpoint

    if onto:
        other = open_checkpoint(onto)
        if other.config != found.config:
            raise UserError(f"{onto} is a model of another shape than {adapter.base}; give one of the same.")
        return MergedWeights(_placed(other, other.dtype)[1], adapter)
    identity, weights = _placed(found, adapter.identity.get("dtype", found.dtype))
    if not is_same_base(adapter.identity, identity):
        raise UserError(
            f"{adapter.base} has changed since {adapter.name} was trained on it; restore it, or name a model "
            "with --merge_onto."
        )
    return MergedWeights(weights, adapter)
