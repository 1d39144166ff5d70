"""`gemma convert SOURCE DESTINATION --format FORMAT`: converts a checkpoint to another format."""

from collections.abc import Sequence

from gemma_jax.config import ComputeConfig, ConvertConfig, MeshConfig, read_command


def run(arguments: Sequence[str], prog: str) -> int:
    """Write the checkpoint SOURCE to the directory DESTINATION. If this fails, nothing of it is left."""
    (source, destination), config = read_command(arguments, prog, "SOURCE DESTINATION", ConvertConfig())

    from gemma_jax.model import ModelSpec
    from gemma_jax.pretrained.checkpoint import open_checkpoint
    from gemma_jax.pretrained.export import PlacedWeights, export
    from gemma_jax.sharding import make_mesh

    found = open_checkpoint(source)
    dtype: str = "" if config.dtype == "auto" else config.dtype
    if config.format == "run" and not dtype:
        # A run has one dtype, so use the widest. It cannot be float16; float32 holds every float16 number.
        dtype = "float32" if found.dtype == "float16" else found.dtype
    kind = found.kind(config.quantization)
    weights = found.weights
    if weights is None:  # a run: its arrays are loaded onto a device in the dtype in which they were saved
        compute = ComputeConfig(param_dtype="bfloat16" if found.dtype == "bfloat16" else "float32")
        spec = ModelSpec(found.config, compute, make_mesh(MeshConfig(cpu_devices=1)), found.kind())
        weights = PlacedWeights(found.params(spec), spec)
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
        quantization=str(kind) if config.quantization else "",
    )
    notice = ", with a NOTICE on the Gemma terms of use" if terms_source else ""
    widest = " (a run has one dtype, so the widest)" * ((config.format, config.dtype) == ("run", "auto"))
    quantised = f" quantised as {config.quantization}" if config.quantization else ""
    print(f"{destination}: {config.format}{quantised}, {written}{widest}{notice}")
    return 0
