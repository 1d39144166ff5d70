"""QLoRA of Gemma 7B on UltraChat, on one TPU v5e chip of 16 GB.

python train.py finetune finetune_ultrachat_qlora
"""

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    ExampleDataConfig,
    FinetuneConfig,
    LoraConfig,
    OptimizerConfig,
)

# gemma plan finetune_ultrachat_qlora --topology v5e-1 --data.batch_size 1 --optimizer.accumulation_steps 1
#   7.02 GiB a chip; 1.212 s a step of one row, with all its tokens in the loss
#   (libtpu 0.0.42.1, jax 0.10.2)
config = FinetuneConfig(
    init_from="google/gemma-7b",
    steps=3000,
    model=PRESETS["gemma_7b"],
    data=ExampleDataConfig(
        sources=("hf:HuggingFaceH4/ultrachat_200k:train_sft",),
        sequence_length=2048,
        batch_size=8,
        long_examples="cut",
    ),
    quantization="nf4",
    lora=LoraConfig(rank=16, alpha=32, dropout=0.05, embedding_rows=(106, 107)),
    optimizer=OptimizerConfig(
        learning_rate=2e-4, warmup_steps=100, b2=0.999, weight_decay=0, accumulation_steps=8
    ),
    compute=ComputeConfig(param_dtype="bfloat16", remat="full", loss_vocab_block=16_000),
    checkpoint=CheckpointConfig(every=250, keep_best=1),
    evaluation=EvaluationConfig(every=250, prompts=("Why is the sky blue?",)),
)
