"""Configs: frozen dataclasses, presets, validation, JSON and the command line. Standard library only."""

from gemma_jax.config.command_line import load, parse
from gemma_jax.config.experiments import ChatConfig, ConvertConfig, PretrainConfig, SampleConfig
from gemma_jax.config.experiments import ChatConfig, PretrainConfig, SampleConfig
from gemma_jax.config.parameter_groups import parameter_groups, settings_by_parameter
from gemma_jax.config.presets import PRESETS, preset
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
    validate,
    validate_chat,
    validate_mesh,
    validate_model,
    validate_on_devices,
    validate_sample,
    validate_sampling,
)

__all__ = [
    "MESH_AXES",
    "PRESETS",
    "ChatConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "ConvertConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "SampleConfig",
    "SamplingConfig",
    "TokenizerConfig",
    "TransformerConfig",
    "differences",
    "from_json",
    "from_record",
    "load",
    "mesh_shape",
    "mesh_text",
    "parameter_groups",
    "parse",
    "preset",
    "replace",
    "settings_by_parameter",
    "suggestion",
    "to_dict",
    "to_json",
    "validate",
    "validate_chat",
    "validate_mesh",
    "validate_model",
    "validate_on_devices",
    "validate_sample",
    "validate_sampling",
    "within",
]
