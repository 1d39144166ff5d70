"""Pretrains the 7B shape on 6 trillion tokens, as the model card says, on 16 pods of TPU v5e."""

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

# gemma plan pretrain_7b_6t_16x_v5e_256 --topology v5e-256 --slices 16
#   10.79 GiB a chip; 3.885 s a step,
#   3.182 of it without Pallas kernels;
#   modelled utilisation 60.9%;
#   6.01e+12 tokens in 8.0 days, 791,254 chip-hours
#   (libtpu 0.0.42.1, jax 0.10.2)
# Without this option, XLA replaces the all-gathers by loops of collective permutes; see docs/sharding.md.
NO_WINDOWED_EINSUM = ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)

config = PretrainConfig(
    steps=179_000,
    model=PRESETS["gemma_7b"],
    tokenizer=TokenizerConfig(path="tokenizer.model"),
    data=DataConfig(sources=("corpus/*.jsonl",), sequence_length=8192, batch_size=4096),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    compute=ComputeConfig(remat="attention", loss_vocab_block=10240, tpu_options=NO_WINDOWED_EINSUM),
    mesh=MeshConfig(slice=16, fsdp=256),
    checkpoint=CheckpointConfig(every=1000),
    evaluation=EvaluationConfig(every=1000),
)
