"""The sections that configs are composed of. Each field has a type, a default and a description.

Every field is a number, a string, a choice or a tuple of those, or a tuple of small dataclasses of such
fields, so that a config can be written on a command line and stored as JSON. This module needs the standard
library only, because reading a config must not need jax.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

TOO_LARGE = 2**31  # every number must be below this, because integers have 32 bits on devices
LARGEST_SEED = 2**32 - 1  # jax.random.key silently drops higher bits
ABOVE_ZERO, BELOW_ONE = 1e-9, 1 - 1e-9  # inclusive bounds for numbers that must not be 0 or 1
MOST_ROWS = 10**6  # in a batch
MOST_CPU_DEVICES = 1024  # jax needs more than a second to create more


def setting(default: Any, meaning: str, least: float | None = None, most: float = TOO_LARGE - 1) -> Any:
    """Returns a dataclass field that can be set in a config.

    Args:
      default: The value if none is given.
      meaning: The description that `--help` prints.
      least: The smallest allowed number; None if the field is not a number, or has bounds checked elsewhere.
      most: The largest allowed number; used only if `least` is given.
    """
    return dataclasses.field(default=default, metadata={"help": meaning, "least": least, "most": most})


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yields the dotted name, field and value of everything that can be set in a config or section."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Gemma decoder (Gemma: Open Models Based on Gemini Research and Technology, 2024)."""

    vocab_size: int = setting(256_000, "Tokens that the model can read and predict.", 1)
    num_layers: int = setting(18, "Decoder blocks.", 1)
    embed_dim: int = setting(2048, "Width of the residual stream.", 1)
    hidden_dim: int = setting(16_384, "Width of each of the two branches of the gated feed-forward.", 1)
    num_heads: int = setting(8, "Query heads.", 1)
    num_kv_heads: int = setting(1, "Key/value heads; must divide num_heads.", 1)
    head_dim: int = setting(256, "Width of one head; num_heads * head_dim need not be embed_dim.", 1)
    context_length: int = setting(8192, "Longest sequence that the model is made for, in tokens.", 1)
    rope_base: float = setting(10_000.0, "Base of the rotary position frequencies.", 1)
    norm_epsilon: float = setting(1e-6, "Added to the mean square in RMSNorm.", 0)
    vocab_multiple: int = setting(
        128, "Embedding rows are stored rounded up to a multiple of this; padding rows are masked.", 1
    )

    @property
    def vocab_rows(self) -> int:
        """Embedding rows as stored: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer, and how it is trained if no file is given."""

    path: str = setting(
        "", "A SentencePiece model file; empty trains one of model.vocab_size pieces on the corpus."
    )
    train_megabytes: float = setting(
        8.0, "Text to train a tokenizer on, sampled evenly from the corpus.", 0.001
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The documents to train on, and how they are packed into batches."""

    sources: tuple[str, ...] = setting(
        ("python-stdlib",),
        "Corpora: python-stdlib (this Python installation's own sources), tfds:NAME, or a path, glob or "
        "bucket address of text files or JSON lines (.jsonl, .ndjson, .json), also compressed (.gz, .bz2, "
        ".zst), of .parquet or .array_record files, a TFDS directory, or tokens:uint16:PATH (uint32) for "
        "ArrayRecord files of token ids.",
    )
    weights: tuple[float, ...] = setting(
        (), "Share of rows from each source; empty means in proportion to their size.", ABOVE_ZERO
    )
    text_field: str = setting("text", "The field or column that holds the text.")
    bad_records: Literal["error", "skip"] = setting(
        "error", "A record that is broken or lacks its text ends the run, or is skipped and counted."
    )
    held_out: float = setting(
        0.01,
        "Share of documents held out for evaluation, chosen by their text's hash; of pieces of them where "
        "there are too few documents.",
        0,
        BELOW_ONE,
    )
    sequence_length: int = setting(2048, "Tokens in a row.", 1)
    batch_size: int = setting(8, "Rows in a global batch.", 1, MOST_ROWS)
    cache_dir: str = setting("~/.cache/gemma_jax", "Where tokenised corpora are kept and found again.")


@dataclasses.dataclass(frozen=True)
class ExampleDataConfig(DataConfig):
    """The examples to fine-tune on, and how they are packed into batches."""

    format: Literal["auto", "dialogue", "completion", "instruction", "text", "preference"] = setting(
        "auto",
        "Fields of a record: messages or conversations; prompt and completion; instruction, input and "
        "output; data.text_field; chosen and rejected. auto decides by the fields of each record.",
    )
    template: Literal["chat", "plain"] = setting(
        "chat",
        "Whether a prompt and its answer become turns of a dialogue, or plain text, one after the other.",
    )
    train_on: Literal["answers", "last_answer", "everything"] = setting(
        "answers", "Tokens in the loss: those of all answers (turns of the model), of the last one, or all."
    )
    train_newline: Literal["on", "off"] = setting(
        "on", "Whether the newline after <end_of_turn> is in the loss, as it is in TRL."
    )
    system: Literal["merge", "error"] = setting(
        "merge", "A system turn is put in front of the first user turn, or is an error."
    )
    long_examples: Literal["drop", "cut"] = setting(
        "drop", "Examples longer than data.sequence_length are left out, or cut at a turn; both are counted."
    )
    packing: Literal["on", "off"] = setting(
        "on", "Several examples share a row, without seeing each other; off pads each to a row of its own."
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA; Hu et al., 2021), trained in the place of the weights."""

    rank: int = setting(0, "Rank of the adapters; 0 trains all parameters and no adapters.", 0, 4096)
    alpha: float = setting(16.0, "What an adapter adds is multiplied by alpha / rank.", 0)
    rslora: Literal["on", "off"] = setting("off", "Multiply by alpha / sqrt(rank) instead (rsLoRA).")
    dropout: float = setting(0.0, "Share of an adapter's inputs that are dropped in training.", 0, BELOW_ONE)
    targets: tuple[str, ...] = setting(
        ("*",),
        "Patterns of the matrices that get adapters: q, k, v, o, gate, up, down; attention.* also works.",
    )
    embedding_rows: tuple[int, ...] = setting(
        (),
        "Token ids whose embedding is trained as well, such as 106 107 when a base model learns dialogues.",
        0,
    )


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimisation (DPO; Rafailov et al., 2023)."""

    beta: float = setting(0.1, "How strongly the model is held to where it began.", ABOVE_ZERO)
    label_smoothing: float = setting(0.0, "Share of pairs that are assumed to be labelled wrongly.", 0, 0.5)


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Settings for the parameters with a dotted name that matches a pattern."""

    pattern: str = setting("", "Of names that `gemma inspect` prints, with *, ? and [...].")
    learning_rate_factor: float | None = setting(None, "Multiplies the learning rate; 0 freezes.", 0)
    weight_decay: float | None = setting(None, "In the place of optimizer.weight_decay.", 0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "adafactor", "lion"] = setting("adamw", "Update rule.")
    learning_rate: float = setting(3e-4, "Peak learning rate.", 0)
    schedule: Literal["cosine", "linear", "warmup-stable-decay", "constant"] = setting(
        "cosine", "Shape of the learning rate after warm-up."
    )
    warmup_steps: int = setting(100, "Steps over which the learning rate rises linearly from 0.", 0)
    decay_fraction: float = setting(
        0.2, "warmup-stable-decay: share of all steps in which the rate falls at the end.", 0, 1
    )
    final_fraction: float = setting(0.1, "Learning rate at the last step, as a share of the peak.", 0, 1)
    b1: float = setting(0.9, "Decay of the first moment.", 0, BELOW_ONE)
    b2: float = setting(0.95, "Decay of the second moment.", 0, BELOW_ONE)
    first_moment_dtype: Literal["param", "float32", "bfloat16"] = setting(
        "param", "Of the stored first moment (AdamW, Lion): compute.param_dtype, or another to save memory."
    )
    epsilon: float = setting(1e-8, "Added to the root of the second moment.", 0)
    weight_decay: float = setting(0.1, "Decoupled decay of weight matrices; norm scales do not decay.", 0)
    groups: tuple[ParameterGroup, ...] = setting(
        (),
        "Parameters with a factor of the learning rate or a decay of their own, by a pattern of "
        "the names that `gemma inspect` prints, as in 'embedding learning_rate_factor=0.1 weight_decay=0'; "
        "where several groups set the same, the last one counts. A factor of 0 keeps the values, "
        "but the parameter still has a gradient and moments.",
    )
    clip_norm: float = setting(1.0, "Largest global gradient norm; 0 turns clipping off.", 0)
    z_loss: float = setting(0.0, "Weight of the squared log-partition penalty (PaLM, 2022: 1e-4).", 0)
    loss_scale: Literal["dynamic", "off"] = setting(
        "dynamic",
        "With compute.dtype float16, multiply the loss by a number, so that no gradient becomes 0; it falls "
        "when a gradient overflows.",
    )
    accumulation_steps: int = setting(1, "Parts that a batch is computed in, one after the other.", 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged. One of data, fsdp and tensor may be -1: all remaining devices."""

    slice: int = setting(
        1,
        "TPU slices, joined by the data-centre network; batches are split and parameters copied over them.",
        1,
    )
    data: int = setting(1, "Devices along which batches are split and parameters copied.", -1)
    fsdp: int = setting(-1, "Devices along which batches and parameters are split.", -1)
    tensor: int = setting(1, "Devices along which heads, feed-forward and vocabulary are split.", -1)
    cpu_devices: int = setting(
        0, "Use this many CPU devices in all; 0 uses the devices that there are.", 0, MOST_CPU_DEVICES
    )


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is executed. This changes speed and memory, and results only by rounding."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = setting(
        "auto",
        "Activations and products; auto is bfloat16 on TPU and GPU (float16 on a GPU that lacks it), float32 "
        "on CPU.",
    )
    param_dtype: Literal["float32", "bfloat16", "float64", "auto"] = setting(
        "float32",
        "Parameters and optimizer state; auto, for a model that is loaded: bfloat16 if it is stored so, "
        "otherwise float32.",
    )
    cache: Literal["auto", "int8"] = setting(
        "auto", "Cached keys and values of sampling, in the dtype of activations or in int8 with scales."
    )
    remat: Literal["none", "products", "projections", "attention", "full", "offload"] = setting(
        "none",
        "What the backward pass computes again: nothing, all but the products, all but attention and its "
        "projections, all but attention, each block from its input; offload keeps in the host's memory.",
    )
    scan_unroll: int = setting(1, "Blocks unrolled into one iteration of the scan over layers.", 1)
    tpu_options: tuple[str, ...] = setting(
        (), "Options of XLA's TPU compiler for the training step, NAME=VALUE; without effect elsewhere."
    )
    gpu_options: tuple[str, ...] = setting((), "The same of XLA's GPU compiler.")
    loss_block: int = setting(256, "Positions of a row whose logits exist at one time in the loss.", 1)
    loss_vocab_block: int = setting(
        0,
        "Or logits of all positions and at most this many vocabulary rows at one time: less memory for "
        "a large vocabulary, a quarter more products in the loss; 0 takes blocks of positions.",
        0,
    )
    compilation_cache: str = setting(
        "", "Folder or bucket that keeps compiled programs, for restarts; empty keeps none."
    )


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """The processes of a job: found on TPU pods, GKE, Slurm and under torchrun, named here elsewhere."""

    coordinator: str = setting("", "HOST:PORT where the process of index 0 is reached by the others.")
    count: int = setting(0, "Processes in all; 0 finds out, 1 looks for no others.", 0)
    index: int = setting(0, "Number of this process, from 0; where a coordinator is named.", 0)
    heartbeat_seconds: int = setting(20, "A process that was not heard of for so long ends the whole job.", 5)


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """What to do if a loss is not finite or jumps."""

    skip_nonfinite: int = setting(
        5, "Steps in a row that are skipped because loss or gradient is not finite; one more ends the run.", 0
    )
    spike_threshold: float = setting(
        0.0, "A loss so many standard deviations above the recent median is high; 0 looks for no spikes.", 0
    )
    spike_window: int = setting(128, "Losses that the median and the deviation are taken of.", 2)
    spike_steps: int = setting(4, "So many high losses in a row are a spike: the run is rolled back.", 1)
    rollback_margin: int = setting(
        0, "Steps that the checkpoint it is rolled back to must be older than the spike's first one.", 0
    )
    skip_batches: int = setting(
        0, "Batches passed over after a spike, besides those from the checkpoint to the spike.", 0
    )
    max_rollbacks: int = setting(3, "Spikes that a run is rolled back for; one more ends it.", 0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every: int = setting(1000, "Steps between checkpoints; the last step is always saved.", 1)
    keep_last: int = setting(2, "Newest checkpoints that are kept.", 1)
    keep_every: int = setting(0, "Checkpoints at multiples of this step are kept for good; 0 keeps none.", 0)
    keep_best: int = setting(0, "Checkpoints with the lowest keep_best_by that are kept besides.", 0)
    keep_best_by: str = setting("held_out_loss", "Number of an evaluation that keep_best compares.")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss during training."""

    every: int = setting(
        500, "Steps between evaluations; the last step is always evaluated; 0 turns it off.", 0
    )
    rows: int = setting(256, "Held-out rows that are evaluated, at most.", 1)
    prompts: tuple[str, ...] = setting((), "Prompts that the model answers at each evaluation, for the log.")
    patience: int = setting(
        0, "End the run after so many evaluations without a lower checkpoint.keep_best_by; 0 never does.", 0
    )


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What a run logs, and where."""

    every: int = setting(10, "Steps between lines of the log.", 1)
    tensorboard: Literal["on", "off"] = setting("off", "Write TensorBoard event files into the run.")
    wandb_project: str = setting("", "Weights & Biases project to log to, when wandb is installed.")


@dataclasses.dataclass(frozen=True)
class TokenBias:
    """A number that is added to the logit of a token."""

    token: int = setting(0, "The token's id.", 0)
    # There is no bias that a token without one could mean, so the default is out of bounds.
    bias: float = setting(math.nan, "Above 0 the token becomes likelier.", 1 - TOO_LARGE)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How new tokens are chosen, and when generation ends."""

    max_new_tokens: int = setting(64, "Tokens to add, at most.", 1)
    temperature: float = setting(
        0.0, "0 takes the likeliest token; 1 samples from the model's distribution.", 0
    )
    top_k: int = setting(0, "Sample among this many likeliest tokens; 0 among all.", 0)
    top_p: float = setting(
        1.0, "Sample among the likeliest tokens that hold this much probability.", ABOVE_ZERO, 1
    )
    seed: int = setting(0, "Decides the samples.", 0, LARGEST_SEED)
    samples: int = setting(1, "Continuations of each prompt.", 1)
    stop: tuple[str, ...] = setting((), "Texts that end a continuation, and are not part of it.")
    batch_size: int = setting(0, "Continuations that are computed at a time; 0 takes all.", 0)
    min_p: float = setting(0.0, "Sample among tokens with this share of the likeliest's probability.", 0, 1)
    repetition_penalty: float = setting(
        1.0, "Divides positive logits of tokens in prompt and text, multiplies negative ones.", ABOVE_ZERO
    )
    logit_bias: tuple[TokenBias, ...] = setting((), "Added to logits of tokens, as in '107 bias=-2.5'.")
    forbidden_tokens: tuple[int, ...] = setting((), "Token ids that are never chosen.", 0)
    end_tokens: tuple[int, ...] = setting((), "Token ids that end a continuation, besides the model's.", 0)
    top_log_probs: int = setting(0, "Likeliest tokens to list for each new one, with --json.", 0, 1024)
    prompt_log_probs: bool = setting(False, "List the prompt's log-probabilities, with --json.")
    prompt_lookup: int = setting(
        0, "Tokens to guess at each step from what followed the same two tokens before; 0 for none.", 0, 32
    )
