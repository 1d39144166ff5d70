"""LoRA of Gemma 2B on English quotes, on the one TPU v5e chip of a free Colab.

python train.py finetune finetune_quotes_colab
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

# gemma plan finetune_quotes_colab --topology v5e-1
#   7.46 GiB a chip; 0.521 s a step; with one row of 8,192 tokens 9.60 GiB, 1.227 s
#   (libtpu 0.0.42.1, jax 0.10.2)
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
    compute=ComputeConfig(param_dtype="bfloat16", remat="projections", loss_vocab_block=16_000),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=50, prompts=("Quote: Imagination is", "Life is")),
)
