"""Which mesh, rematerialisation and batch: what can be tried, and the order of what was found."""

import itertools
from collections.abc import Iterator, Sequence
from typing import get_args, get_type_hints

from gemma_jax.config import ComputeConfig, TrainingConfig, replace, validate, validate_on_devices
from gemma_jax.errors import UserError

REMAT_POLICIES: tuple[str, ...] = get_args(get_type_hints(ComputeConfig)["remat"])


def variants(
    config: TrainingConfig,
    devices: int,
    data: Sequence[int],
    tensor: Sequence[int],
    remat: Sequence[str],
    rows: Sequence[int],
) -> Iterator[TrainingConfig]:
    """The configs that are possible on so many devices; of each mesh and policy those with fewest rows first.

    Args:
      config: what they all share.
      devices: of the topology.
      data, tensor: sizes of these mesh axes; fsdp takes what is left.
      remat: policies.
      rows: of the batch, for each device that has rows of its own.
    """
    for over_data, over_tensor, policy, row in itertools.product(data, tensor, remat, sorted(rows)):
        parts = over_data * over_tensor
        if devices % parts:
            continue
        changes = {
            "mesh.data": over_data,
            "mesh.fsdp": devices // parts,
            "mesh.tensor": over_tensor,
            "compute.remat": policy,
            "data.batch_size": row * devices // over_tensor * config.optimizer.accumulation_steps,
        }
        try:
            variant = replace(config, changes)
            validate(variant)
            validate_on_devices(variant, devices)
        except UserError:
            continue  # this combination cannot be; others can
        yield variant
