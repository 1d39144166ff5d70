"""DPO of finetune_tiny's adapter on 200 pairs of answers: a minute or two on two CPU cores.

    python train.py finetune preferences_tiny --init_from runs/finetune_tiny

The pairs are synthetic, about the things of finetune_tiny: a sure answer is chosen, a hesitant one rejected.
"""

from pathlib import Path

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    ExampleDataConfig,
    FinetuneConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
)

config = FinetuneConfig(
    init_from="runs/finetune_tiny",
    objective="dpo",
    steps=40,
    model=PRESETS["gemma_small"],
    data=ExampleDataConfig(
        sources=(str(Path(__file__).with_suffix(".jsonl")),), sequence_length=256, batch_size=8, held_out=0.1
    ),
    # As the adapter that it begins with, which is also the reference.
    lora=LoraConfig(rank=16, alpha=16, embedding_rows=(106, 107)),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=5, weight_decay=0),
    compute=ComputeConfig(scan_unroll=4, loss_block=32),
    mesh=MeshConfig(cpu_devices=2),
    checkpoint=CheckpointConfig(every=40),
    evaluation=EvaluationConfig(every=20, prompts=("What colour is coal?",)),
)
