"""Pretrains the 2B shape at 8192 tokens on one machine of eight H100 GPUs: 10 billion tokens."""

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

# gemma plan pretrain_2b_h100_8 --topology h100-8
#   56.35 GiB a GPU; 1.769 s a step by a roofline;
#   modelled utilisation 63%
#   (jax-cuda13-pjrt 0.10.2, nvidia-cuda-nvcc 13.5.37, nvidia-nvvm 13.5.37, jax 0.10.2)
# Weights and gradients are exchanged while the GPUs compute, many of them in one message; see docs/gpu.md.
OVERLAP = (
    "xla_gpu_enable_latency_hiding_scheduler=True",
    "xla_gpu_all_gather_combine_threshold_bytes=268435456",
    "xla_gpu_reduce_scatter_combine_threshold_bytes=268435456",
)

config = PretrainConfig(
    steps=19_000,
    model=PRESETS["gemma_2b"],
    tokenizer=TokenizerConfig(path="tokenizer.model"),
    data=DataConfig(sources=("corpus/*.jsonl",), sequence_length=8192, batch_size=64),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, accumulation_steps=2),
    compute=ComputeConfig(remat="products", loss_vocab_block=16_000, gpu_options=OVERLAP),
    mesh=MeshConfig(fsdp=8),
    checkpoint=CheckpointConfig(every=1000),
    evaluation=EvaluationConfig(every=1000),
)
