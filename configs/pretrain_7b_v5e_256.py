"""Pretrains the 7B shape at 8192 tokens on a pod of TPU v5e: 1 trillion tokens."""

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)

# gemma plan pretrain_7b_v5e_256 --topology v5e-256
#   10.79 GiB a chip; 3.868 s a step,
#   3.165 of it without Pallas kernels;
#   modelled utilisation 61.1%;
#   9.98e+11 tokens in 21.3 days, 130,921 chip-hours
#   (libtpu 0.0.42.1, jax 0.10.2)
# Without this option, XLA replaces the all-gathers by loops of collective permutes; see docs/sharding.md.
NO_WINDOWED_EINSUM = ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)

config = PretrainConfig(
    steps=476_000,
    model=PRESETS["gemma_7b"],
    tokenizer=TokenizerConfig(path="tokenizer.model"),
    data=DataConfig(sources=("corpus/*.jsonl",), sequence_length=8192, batch_size=256),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    compute=ComputeConfig(
        remat="attention", scan_unroll=28, loss_vocab_block=10240, tpu_options=NO_WINDOWED_EINSUM
    ),
    mesh=MeshConfig(fsdp=256),
    checkpoint=CheckpointConfig(every=1000),
    evaluation=EvaluationConfig(every=1000),
)
