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
    SamplingConfig,
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
class SampleConfig(SamplingConfig):
    """Continue prompts with a trained model."""

    prompt: tuple[str, ...] = setting((), "Text to continue; may be given several times.")
    stream: bool = setting(False, "Print text while it is made; for a single prompt and sample.")
    json: bool = setting(False, "Print one JSON object a line and nothing else.")
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
