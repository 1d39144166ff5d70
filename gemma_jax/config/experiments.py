"""What a command runs: sections put together."""

import dataclasses
from dataclasses import field
from typing import Literal

from gemma_jax.config.sections import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TransformerConfig,
    setting,
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Train a Gemma from random weights."""

    run_dir: str = setting("", "Where the run is kept, or a bucket address; empty means runs/NAME of CONFIG.")
    existing_run: Literal["resume", "overwrite"] = setting(
        "resume", "What to do with a run that is there already: go on with it, or delete it and begin anew."
    )
    steps: int = setting(1000, "Optimizer steps in all.")
    seed: int = setting(0, "Decides the initial weights, the held-out order and the order of the data.")
    model: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Continue prompts with a trained model."""

    prompt: tuple[str, ...] = setting((), "Text to continue; may be given several times.")
    max_new_tokens: int = setting(64, "Tokens to add, at most.")
    temperature: float = setting(0.0, "0 takes the likeliest token; 1 samples from the model's distribution.")
    top_k: int = setting(0, "Sample among this many likeliest tokens; 0 among all.")
    top_p: float = setting(1.0, "Sample among the likeliest tokens that hold this much probability.")
    seed: int = setting(0, "Decides the samples.")
    json: bool = setting(False, "Print one JSON object a line and nothing else.")
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
