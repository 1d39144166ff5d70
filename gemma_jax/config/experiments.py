"""The configs of the commands, each composed of sections."""

import dataclasses
from dataclasses import field
from typing import Literal

from gemma_jax.config.sections import (
    LARGEST_SEED,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    ExampleDataConfig,
    HostsConfig,
    LoggingConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
    SamplingConfig,
    StabilityConfig,
    TokenizerConfig,
    TransformerConfig,
    setting,
)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The config of every command that trains. Training and planning use no other config."""

    run_dir: str = setting("", "Where the run is kept, or a bucket address; empty means runs/NAME of CONFIG.")
    existing_run: Literal["resume", "overwrite"] = setting(
        "resume", "What to do if run_dir holds a run already: resume it, or delete it and start again."
    )
    fork_from: str = setting(
        "",
        "Begin this run with the parameters, optimizer state and data position of another: its run directory "
        "(the newest checkpoint) or RUN/checkpoints/STEP.",
    )
    steps: int = setting(1000, "Optimizer steps in all.", 1)
    seed: int = setting(
        0, "Decides the initial weights, the held-out order and the order of the data.", 0, LARGEST_SEED
    )
    profile: str = setting(
        "", "Steps to trace for xprof into RUN/profile: 12, or 10:13 for four steps; empty traces none."
    )
    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Train a Gemma from random weights."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Train a published or trained model further, all of it or adapters."""

    init_from: str = setting(
        "",
        "The checkpoint to begin with: a run, a Hugging Face, PEFT or Flax directory, a GGUF file, a name "
        "on the Hub. The model section becomes that of the checkpoint.",
    )
    objective: Literal["sft", "dpo"] = setting(
        "sft", "Minimise the cross entropy of the answers, or the DPO loss of preference pairs."
    )
    quantization: str = setting(
        "", "Quantise the frozen weights below the adapters: nf4 (QLoRA), int8, int4; empty: as stored."
    )
    data: ExampleDataConfig = field(default_factory=ExampleDataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dpo: PreferenceConfig = field(default_factory=PreferenceConfig)


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """How a trained model is loaded."""

    instruction_tuned: Literal["auto", "yes", "no"] = setting(
        "auto",
        "Whether the model was trained on dialogues; auto decides by generation_config.json and the name.",
    )
    quantization: str = setting(
        "",
        "Quantise the weights while loading: int8, int4, int4:BLOCK, int4:channel or nf4; empty: as stored.",
    )
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(param_dtype="auto"))
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def is_instruction_tuned(self) -> bool | None:
        """The setting as `Gemma.from_pretrained` takes it: True, False, or None for auto."""
        return None if self.instruction_tuned == "auto" else self.instruction_tuned == "yes"


@dataclasses.dataclass(frozen=True)
class SampleConfig(LoadConfig, SamplingConfig):
    """Continue prompts with a trained model."""

    prompt: tuple[str, ...] = setting((), "Text to continue; may be given several times.")
    prompt_file: str = setting(
        "",
        "A file that is another prompt, or - for standard input. Of a .jsonl file, or - with --json, a line "
        "is an object with a prompt and, where they differ, settings of sampling.",
    )
    raw: bool = setting(
        False, "Continue the prompt as it is, where an instruction-tuned model would get it as a turn."
    )
    stream: bool = setting(False, "Print text while it is made, as in a terminal; for a single prompt.")
    json: bool = setting(False, "Print one JSON object a line and nothing else.")
    precompile: bool = setting(
        False,
        "Only compile and keep the programs for prompts of every length with these settings, batch_size at a "
        "time (0: one). Weights are not read.",
    )


@dataclasses.dataclass(frozen=True)
class ChatConfig(LoadConfig, SamplingConfig):
    """Talk with an instruction-tuned model."""

    max_new_tokens: int = setting(1024, "Tokens of an answer, at most.")
    system: str = setting("", "An instruction that is put in front of your first message.")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint to another format."""

    format: Literal["huggingface", "flax", "run", "gguf", "peft"] = setting(
        "huggingface",
        "A directory as of Hugging Face, one of the published Flax form, a run of gemma_jax at step 0, or a "
        "directory with a GGUF file for llama.cpp; peft: an adapter alone, in the files of PEFT.",
    )
    merge: bool = setting(
        False,
        "Merge an adapter into the weights that it was trained on (dequantised, if they were quantised).",
    )
    merge_onto: str = setting("", "Merge it into the weights of this checkpoint instead.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Of the numbers written; auto keeps that of the source."
    )
    quantization: str = setting(
        "",
        "Quantise the weights: a run as int8, int4, int4:BLOCK, int4:channel or nf4; huggingface as nf4, as "
        "bitsandbytes does; gguf as int8 (q8_0) or int4 (q4_0).",
    )
    gemma_terms: Literal["auto", "yes", "no"] = setting(
        "auto",
        "Whether the weights derive from Google's, so that a NOTICE on its terms of use is written; "
        "auto: where the source has one, comes from Google, or is a published form of a published size.",
    )


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Check the weights of a checkpoint, and the outputs that the model computes with them."""

    against: str = setting(
        "",
        "Another checkpoint, which is compared array by array; or the original of a quantised one, whose "
        "outputs are compared.",
    )
    quantization: str = setting(
        "", "Quantise the weights (int8, int4, int4:BLOCK, int4:channel, nf4) and compare the outputs."
    )
    text: str = setting("", "A text file on which a quantised model is compared with its original.")
    tokens: int = setting(4096, "Tokens of that text, at most.", 2)
    prompt: str = setting(
        "The Analytical Engine weaves algebraical patterns just as the Jacquard loom weaves flowers and "
        "leaves.",
        "Text for which the layers are compared with those of transformers, where that is installed.",
    )
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
