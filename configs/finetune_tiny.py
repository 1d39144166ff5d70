"""LoRA of the demo's model on 400 questions about colours: a minute or two on two CPU cores.

    python train.py pretrain demo
    python train.py finetune finetune_tiny --init_from runs/demo
    gemma sample runs/finetune_tiny --prompt "What colour is coal?"

The questions are synthetic: 20 things in 20 sentences each. Those held out are about the same things, in
sentences that were seen with other things only.
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
    init_from="runs/demo",
    steps=200,
    model=PRESETS["gemma_small"],
    data=ExampleDataConfig(
        sources=(str(Path(__file__).with_suffix(".jsonl")),), sequence_length=256, batch_size=8, held_out=0.1
    ),
    # The base has never seen a turn, so the embedding of <start_of_turn> and <end_of_turn> is trained, too.
    lora=LoraConfig(rank=16, alpha=16, embedding_rows=(106, 107)),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=10, weight_decay=0),
    compute=ComputeConfig(scan_unroll=4, loss_block=32),
    mesh=MeshConfig(cpu_devices=2),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(
        every=50, prompts=("What colour is coal?", "Which pencil do I take for a carrot?")
    ),
)
