"""QLoRA of Gemma 7B on UltraChat, on one GPU of 24 GB, such as an L4 or an RTX 4090.

python train.py finetune finetune_7b_qlora_24gb
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

# gemma plan finetune_7b_qlora_24gb --topology l4
#   10.70 GiB a GPU; 24.446 s a step by a roofline;
#   modelled utilisation 40%
#   (jax-cuda13-pjrt 0.10.2, nvidia-cuda-nvcc 13.5.37, nvidia-nvvm 13.5.37, jax 0.10.2)
config = FinetuneConfig(
    init_from="google/gemma-7b",
    steps=3000,
    model=PRESETS["gemma_7b"],
    data=ExampleDataConfig(
        sources=("hf:HuggingFaceH4/ultrachat_200k:train_sft",),
        sequence_length=4096,
        batch_size=8,
        long_examples="cut",
    ),
    quantization="nf4",
    lora=LoraConfig(rank=16, alpha=32, dropout=0.05, embedding_rows=(106, 107)),
    optimizer=OptimizerConfig(
        learning_rate=2e-4, warmup_steps=100, b2=0.999, weight_decay=0, accumulation_steps=4
    ),
    compute=ComputeConfig(param_dtype="bfloat16", remat="full", loss_vocab_block=16_000),
    checkpoint=CheckpointConfig(every=250, keep_best=1),
    evaluation=EvaluationConfig(every=250, prompts=("Why is the sky blue?",)),
)
