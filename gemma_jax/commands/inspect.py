"""`gemma inspect CONFIG_OR_CHECKPOINT`: prints how each parameter is sharded. It needs only the shapes."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from gemma_jax.config import (
    PRESETS,
    PretrainConfig,
    TrainingConfig,
    from_record,
    mesh_text,
    preset,
    read_command,
    validate_mesh,
    validate_model,
)
from gemma_jax.paths import user_path
from gemma_jax.training.run_directory import load_config


def run(arguments: Sequence[str], prog: str) -> int:
    """Print one line per parameter: shape, dtype, logical axes, partition, and bytes on one device."""
    default: TrainingConfig = PretrainConfig()
    _, config = read_command(arguments, prog, "CONFIG_OR_CHECKPOINT", default, load=_config)
    validate_model(config.model)
    validate_mesh(config.mesh)

    import jax
    from flax import nnx

    from gemma_jax.commands.tables import report_console, table
    from gemma_jax.model import ModelSpec
    from gemma_jax.sharding import logical_axes, make_mesh, parameter_name

    mesh = make_mesh(config.mesh)
    abstract = ModelSpec(config.model, config.compute, mesh).params
    titles = ["parameter", "shape", "dtype", "logical axes", "partition", "bytes a device"]
    rows = table(titles, right=titles[-1:])
    count, bytes_a_device = 0, 0
    leaves = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for path, variable in leaves:
        value = variable.get_value()
        sharding = value.sharding
        held = math.prod(sharding.shard_shape(value.shape)) * value.dtype.itemsize
        count, bytes_a_device = count + value.size, bytes_a_device + held
        axes, partition = logical_axes(variable), sharding.spec
        row = (value.shape, value.dtype, " ".join(map(str, axes)), " ".join(str(p or "-") for p in partition))
        rows.add_row(parameter_name(path), *map(str, row), f"{held:,}")
    report_console().print(rows)
    shape = mesh_text(mesh.shape)
    print(
        f"{count:,} parameters in {len(leaves)} arrays, those of blocks with all layers in one; "
        f"{bytes_a_device:,} bytes a device on {mesh.size} devices ({shape})"
    )
    return 0


def _config(name: str) -> TrainingConfig:
    if name.startswith("random:"):  # the form that `gemma sample` also accepts
        return PretrainConfig(model=preset(name.removeprefix("random:")))
    if name in PRESETS:
        return PretrainConfig(model=PRESETS[name])
    folder = user_path(name)
    record = folder / "run" / "data.json"
    # os.path.isfile does not raise an error if the name is too long.
    if record.exists() if "://" in name else os.path.isfile(record):
        from gemma_jax.checkpoint.record import run_record

        return from_record(run_record(folder).config, name)
    # A file can be a config, unless it is a GGUF file.
    if os.path.lexists(folder) and (not os.path.isfile(folder) or folder.suffix == ".gguf"):
        from gemma_jax.pretrained.checkpoint import is_published, open_checkpoint, refuse_others

        refuse_others(name, Path(folder))
        if is_published(folder):
            return PretrainConfig(model=open_checkpoint(name).config)
    return load_config(name, TrainingConfig)[0]
