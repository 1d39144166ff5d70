"""What the hardware could do and what the model asks of it: floating-point operations and memory."""

import re
import resource
import sys
from collections.abc import Iterable

import jax

from gemma_jax.config import TransformerConfig

# Dense bfloat16 FLOP/s by `jax.Device.device_kind`, or its first words; the longest entry that fits counts.
# TPUs are listed by TensorCore, because a device can be a chip of two or one core (`Device.num_cores`).
PEAK_FLOPS = {
    "TPU v4": 275e12 / 2,  # docs.cloud.google.com/tpu/docs/v4: 275 TFLOPs a chip of two cores
    "TPU v5 lite": 197e12,  # docs.cloud.google.com/tpu/docs/v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12 / 2,  # docs.cloud.google.com/tpu/docs/v5p
    "TPU v5p": 459e12 / 2,
    "TPU v6 lite": 918e12,  # docs.cloud.google.com/tpu/docs/v6e
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # docs.cloud.google.com/tpu/docs/tpu7x
    # nvidia.com/en-us/data-center/..., where most figures are with 2:4 sparsity: those are halved here.
    "NVIDIA A100": 312e12,  # a100
    "NVIDIA H100": 989e12,  # h100: 1,979 sparse, SXM
    "NVIDIA H100 NVL": 835e12,  # h100: 1,671 sparse
    "NVIDIA H100 PCIe": 756e12,  # the h100 data sheet of 2022: 1,513 sparse
    "NVIDIA H200": 989e12,  # h200: 1,979 sparse, SXM
    "NVIDIA H200 NVL": 835e12,  # h200: 1,671 sparse
    "NVIDIA GH200": 989e12,  # grace-hopper-superchip: 1,979 sparse
    "NVIDIA B200": 2250e12,  # hgx: 36 PFLOPS sparse in 8
    "NVIDIA GB200": 2500e12,  # gb200-nvl72: 360 PFLOPS sparse in 72
    "NVIDIA L4": 121e12,  # l4: 242 sparse
    "Tesla T4": 65e12,  # tesla-t4: of float16, for it has no bfloat16
}


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Dense bfloat16 FLOP/s of all devices together; None where one of them is not in the table."""
    total = 0.0
    for device in devices:
        known = [kind for kind in PEAK_FLOPS if re.match(rf"{kind}\b", device.device_kind)]
        if not known:
            return None
        total += PEAK_FLOPS[max(known, key=len)] * getattr(device, "num_cores", 1)
    return total


def training_flops_a_token(model: TransformerConfig, sequence_length: int) -> float:
    """Floating-point operations that one token needs, forward and backward.

    Two for each weight of a matrix product forward and twice that backward, and the products of attention,
    of which causality needs half (PaLM, 2022, appendix B, which counts them whole). The tied embedding counts
    once, for the logits: looking a row up is no product. Recomputed activations, norms and padding rows of
    the vocabulary do not count: this is what the model asks for, not what a program does.
    """
    heads = 2 * model.num_heads + 2 * model.num_kv_heads  # q and o, k and v
    weights = model.embed_dim * (heads * model.head_dim + 3 * model.hidden_dim)
    # A token sees sequence_length / 2 tokens on average: one product for its scores, one for the values.
    attention = 2 * model.num_heads * model.head_dim * sequence_length / 2
    return 6.0 * (model.num_layers * (weights + attention) + model.vocab_size * model.embed_dim)


def peak_memory() -> int:
    """Most bytes in use so far: on the fullest device of this process, or of the process itself on CPU."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in statistics if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    # getrusage(2): kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def quantity(value: float, unit: str) -> str:
    """`1.23 GB`: three digits, with a decimal prefix."""
    power = 0
    while value >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"
