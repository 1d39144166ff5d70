"""Pretrains the 2B shape at 8192 tokens on 16 chips of TPU v5e: 20 billion tokens."""

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

# gemma plan pretrain_2b_v5e_16 --topology v5e-16
#   7.08 GiB a chip; 1.153 s a step,
#   0.926 of it without Pallas kernels;
#   modelled utilisation 60.8%;
#   1.99e+10 tokens in 2.0 days, 779 chip-hours
#   (libtpu 0.0.42.1, jax 0.10.2)
# Without this option, XLA replaces the all-gathers by loops of collective permutes; see docs/sharding.md.
NO_WINDOWED_EINSUM = ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)

config = PretrainConfig(
    steps=152_000,
    model=PRESETS["gemma_2b"],
    tokenizer=TokenizerConfig(path="tokenizer.model"),
    data=DataConfig(sources=("corpus/*.jsonl",), sequence_length=8192, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    compute=ComputeConfig(
        remat="projections", scan_unroll=18, loss_vocab_block=10240, tpu_options=NO_WINDOWED_EINSUM
    ),
    mesh=MeshConfig(fsdp=16),
    checkpoint=CheckpointConfig(every=1000),
    evaluation=EvaluationConfig(every=1000),
)
