"""LoRA of Gemma 2B on English quotes, on the T4 GPU of a free Colab, which computes in float16.

python train.py finetune finetune_quotes_t4
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

# gemma plan finetune_quotes_t4 --topology t4
#   7.64 GiB a GPU; 1.429 s a step by a roofline;
#   modelled utilisation 45%
#   (jax-cuda13-pjrt 0.10.2, nvidia-cuda-nvcc 13.5.37, nvidia-nvvm 13.5.37, jax 0.10.2)
config = FinetuneConfig(
    init_from="google/gemma-2b",
    steps=200,
    model=PRESETS["gemma_2b"],
    data=ExampleDataConfig(
        sources=("hf:Abirate/english_quotes:train",),
        text_field="quote",
        format="text",
        sequence_length=512,
        batch_size=8,
    ),
    lora=LoraConfig(rank=8, alpha=16),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0),
    compute=ComputeConfig(
        dtype="float16", param_dtype="bfloat16", remat="projections", loss_vocab_block=16_000
    ),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=50, prompts=("Quote: Imagination is", "Life is")),
)
