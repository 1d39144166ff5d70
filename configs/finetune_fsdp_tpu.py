"""All weights of Gemma 7B on UltraChat, split over 16 TPU v5e chips, with Adam in float32.

python train.py finetune finetune_fsdp_tpu
"""

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    ExampleDataConfig,
    FinetuneConfig,
    OptimizerConfig,
)

# gemma plan finetune_fsdp_tpu --topology v5e-16
#   11.57 GiB a chip; 0.902 s a step; over fsdp 1.03 times the least possible bytes
#   (libtpu 0.0.42.1, jax 0.10.2)
config = FinetuneConfig(
    init_from="google/gemma-7b",
    steps=2000,
    model=PRESETS["gemma_7b"],
    data=ExampleDataConfig(
        sources=("hf:HuggingFaceH4/ultrachat_200k:train_sft",),
        sequence_length=2048,
        batch_size=16,
        long_examples="cut",
    ),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=100, b2=0.95, weight_decay=0),
    compute=ComputeConfig(remat="full", loss_vocab_block=16_000),
    checkpoint=CheckpointConfig(every=250, keep_best=1),
    evaluation=EvaluationConfig(every=250),
)
