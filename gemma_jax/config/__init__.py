"""Configs: frozen dataclasses, presets, validation, JSON and the command line. Standard library only."""

from gemma_jax.config.command_line import load, parse, read_command
from gemma_jax.config.experiments import (
    ChatConfig,
    ConvertConfig,
    FinetuneConfig,
    LoadConfig,
    PretrainConfig,
    SampleConfig,
    TrainingConfig,
    VerifyConfig,
)
from gemma_jax.config.presets import PRESETS, preset
from gemma_jax.config.sections import (
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
    ParameterGroup,
    PreferenceConfig,
    SamplingConfig,
    StabilityConfig,
    TokenBias,
    TokenizerConfig,
    TransformerConfig,
)
from gemma_jax.config.serialization import (
    differences,
    from_json,
    from_record,
    replace,
    suggestion,
    to_dict,
    to_json,
    within,
)
from gemma_jax.config.validation import (
    MESH_AXES,
    mesh_shape,
    mesh_text,
    profiled_steps,
    sampling_config,
    sampling_configs,
    validate,
    validate_bounds,
    validate_chat,
    validate_mesh,
    validate_model,
    validate_on_devices,
    validate_sample,
    validate_sampling,
    validate_stream,
    validate_verify,
)
