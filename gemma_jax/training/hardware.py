"""The floating-point speed and memory of the hardware, and the operations that a model needs."""

import re
import resource
import sys
from collections.abc import Iterable

import jax

from gemma_jax.config import TransformerConfig

# Dense bfloat16 FLOP/s by `jax.Device.device_kind` or its first words; the longest match is used.
# TPUs are listed per TensorCore, because a device can have one core or two (`Device.num_cores`).
PEAK_FLOPS = {
    "TPU v4": 275e12 / 2,  # docs.cloud.google.com/tpu/docs/v4: 275 TFLOPs per chip of two cores
    "TPU v5 lite": 197e12,  # docs.cloud.google.com/tpu/docs/v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12 / 2,  # docs.cloud.google.com/tpu/docs/v5p
    "TPU v5p": 459e12 / 2,
    "TPU v6 lite": 918e12,  # docs.cloud.google.com/tpu/docs/v6e
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # docs.cloud.google.com/tpu/docs/tpu7x
    # nvidia.com/en-us/data-center/...: most figures there assume 2:4 sparsity; those are halved here.
    "NVIDIA A100": 312e12,  # a100
    "NVIDIA H100": 989e12,  # h100: 1,979 sparse, SXM
    "NVIDIA H100 NVL": 835e12,  # h100: 1,671 sparse
    "NVIDIA H100 PCIe": 756e12,  # the h100 data sheet of 2022: 1,513 sparse
    "NVIDIA H200": 989e12,  # h200: 1,979 sparse, SXM
    "NVIDIA H200 NVL": 835e12,  # h200: 1,671 sparse
    "NVIDIA GH200": 989e12,  # grace-hopper-superchip: 1,979 sparse
    "NVIDIA B200": 2250e12,  # hgx: 36 PFLOPS sparse for 8 GPUs
    "NVIDIA GB200": 2500e12,  # gb200-nvl72: 360 PFLOPS sparse for 72 GPUs
    "NVIDIA L4": 121e12,  # l4: 242 sparse
    "NVIDIA GeForce RTX 4090": 165e12,  # the Ada architecture's white paper, with float32 sums: 330 sparse
    "Tesla T4": 65e12,  # tesla-t4: the float16 figure, because it has no bfloat16
}


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Returns the dense bfloat16 FLOP/s of all devices together, or None if one is not in the table."""
    total = 0.0
    for device in devices:
        known = [kind for kind in PEAK_FLOPS if re.match(rf"{kind}\b", device.device_kind)]
        if not known:
            return None
        total += PEAK_FLOPS[max(known, key=len)] * getattr(device, "num_cores", 1)
    return total


def training_flops_a_token(model: TransformerConfig, sequence_length: int, *, frozen: bool = False) -> float:
    """Returns the floating-point operations that one token needs, forward and backward.

    Each weight of a matmul counts two operations forward and four backward. The matmuls of attention count
    half, because of the causal mask (PaLM, 2022, appendix B, counts them in full). The tied embedding counts
    once, for the logits, because an embedding lookup is not a matmul. Recomputed activations, norms and
    padding rows of the vocabulary do not count: this is what the model requires, not what a program executes.
    A frozen weight counts two operations backward, and the adapters over it none.
    """
    heads = 2 * model.num_heads + 2 * model.num_kv_heads  # q and o, k and v
    weights = model.embed_dim * (heads * model.head_dim + 3 * model.hidden_dim)
    # A token attends to sequence_length / 2 tokens on average: one matmul for the scores, one for the values.
    attention = 2 * model.num_heads * model.head_dim * sequence_length / 2
    return (4.0 if frozen else 6.0) * (
        model.num_layers * (weights + attention) + model.vocab_size * model.embed_dim
    )


def peak_memory() -> int:
    """Returns the peak memory so far in bytes: of this process's fullest device, or of the process on CPU."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in statistics if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    # getrusage(2) reports kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def quantity(value: float, unit: str) -> str:
    """Formats a value with three digits and a decimal prefix, such as `1.23 GB`."""
    power = 0
    while value >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"
