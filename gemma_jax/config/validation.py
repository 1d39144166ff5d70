"""Checks configs for invalid and contradictory values before anything is loaded or compiled."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.config.experiments import (
    ChatConfig,
    FinetuneConfig,
    SampleConfig,
    TrainingConfig,
    VerifyConfig,
)
from gemma_jax.config.sections import (
    TOO_LARGE,
    ComputeConfig,
    HostsConfig,
    MeshConfig,
    SamplingConfig,
    TokenBias,
    TransformerConfig,
    leaves,
)
from gemma_jax.config.serialization import from_dict
from gemma_jax.errors import UserError

MESH_AXES = ("slice", "data", "fsdp", "tensor")
MOST_PARAMETERS = 10**13  # more than any machine holds; a larger model must be a typing mistake


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def validate_bounds(config: Any, prefix: str = "") -> None:
    """Checks every number of a config or section against the bounds of its field.

    Args:
      config: A dataclass with fields made by `setting`.
      prefix: The prefix of field names in messages, such as "model.".

    Raises:
      UserError: A number is out of bounds; the message names the field, its value and its bounds.
    """
    for name, field, value in leaves(config, prefix):
        least, most = field.metadata["least"], field.metadata["most"]
        for number in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(number):
                validate_bounds(number, f"{name}: ")
            elif least is not None and number is not None:
                _require(least <= number <= most, f"{name} is {value}, but must be from {least} to {most}.")


def validate_model(model: TransformerConfig) -> None:
    """Raises UserError if no Gemma can have this shape."""
    validate_bounds(model, "model.")
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_kv_heads is {model.num_kv_heads}, which does not divide "
        f"model.num_heads, {model.num_heads}.",
    )
    _require(
        model.head_dim % 2 == 0, f"model.head_dim is {model.head_dim}, but rotary positions need it even."
    )
    attention = 2 * model.head_dim * (model.num_heads + model.num_kv_heads)
    parameters = model.embed_dim * (model.vocab_rows + model.num_layers * (attention + 3 * model.hidden_dim))
    _require(
        parameters <= MOST_PARAMETERS,
        f"a model of num_layers {model.num_layers}, embed_dim {model.embed_dim}, hidden_dim "
        f"{model.hidden_dim} and vocab_size {model.vocab_size} has {parameters:.1e} parameters, but at most "
        f"{MOST_PARAMETERS:.0e} are supported; make one of them smaller.",
    )


def _validate_compute(compute: ComputeConfig) -> None:
    for option in (*compute.tpu_options, *compute.gpu_options):
        name, equals, value = option.partition("=")
        _require(
            bool(name and equals and value),
            f"compute.tpu_options or gpu_options holds {option!r}, but an option is written NAME=VALUE.",
        )


def validate(config: TrainingConfig) -> None:
    """Checks everything in a config that can be checked without devices or data.

    Raises:
      UserError: A value is invalid or fields contradict each other; the message names them.
    """
    model, data, optimizer = config.model, config.data, config.optimizer
    validate_bounds(config)
    validate_model(model)
    _validate_compute(config.compute)
    _require(
        config.compute.param_dtype != "auto",
        "compute.param_dtype is auto, but what is trained has a dtype of its own; give float32 or bfloat16.",
    )
    _validate_hosts(config.hosts)
    profiled = profiled_steps(config.profile)
    _require(
        not profiled or profiled[-1] <= config.steps,
        f"profile is {config.profile}, but the run has {config.steps} steps.",
    )
    for group in optimizer.groups:
        _require(
            bool(group.pattern) and (group.learning_rate_factor, group.weight_decay) != (None, None),
            f"optimizer.groups has {group}, but a group is a pattern of parameter names and a "
            "learning_rate_factor, a weight_decay or both.",
        )
    decay = round(optimizer.decay_fraction * config.steps) * (optimizer.schedule == "warmup-stable-decay")
    _require(
        optimizer.warmup_steps + decay <= config.steps,
        f"optimizer.warmup_steps is {optimizer.warmup_steps}"
        + (f" and optimizer.decay_fraction of {config.steps} steps {decay}" if decay else "")
        + f", more than all {config.steps} steps; warm up more briefly, or raise steps.",
    )
    _require(
        data.sequence_length <= model.context_length,
        f"data.sequence_length is {data.sequence_length}, longer than "
        f"model.context_length, {model.context_length}.",
    )
    _require(
        data.batch_size % optimizer.accumulation_steps == 0,
        f"data.batch_size is {data.batch_size}, which optimizer.accumulation_steps, "
        f"{optimizer.accumulation_steps}, does not divide.",
    )
    _require(
        data.batch_size * data.sequence_length < TOO_LARGE,
        f"data.batch_size is {data.batch_size} rows of {data.sequence_length} tokens, but a batch has fewer "
        f"than {TOO_LARGE} tokens.",
    )
    _require(bool(data.text_field), "data.text_field is empty; name the field that holds the text.")
    _require(len(data.sources) > 0, "data.sources is empty; name a corpus, such as python-stdlib.")
    _require(
        len(data.weights) in (0, len(data.sources)),
        f"data.weights has {len(data.weights)} entries for {len(data.sources)} data.sources; "
        "give one each, or none.",
    )
    validate_mesh(config.mesh)
    if config.mesh.cpu_devices:
        validate_on_devices(config, config.mesh.cpu_devices)
    if isinstance(config, FinetuneConfig):
        _validate_finetune(config)


def _validate_finetune(config: FinetuneConfig) -> None:
    _require(
        not config.quantization or config.lora.rank > 0,
        f"quantization is {config.quantization}, but quantised weights cannot be trained; set lora.rank to "
        "train adapters over them.",
    )
    _require(len(config.lora.targets) > 0, "lora.targets is empty; name patterns such as q v, or * for all.")
    pairs, form = config.objective == "dpo", config.data.format
    _require(
        form == "auto" or (form == "preference") == pairs,
        f"data.format is {form}, but objective {config.objective} learns from "
        f"{'preference pairs' if pairs else 'other examples'}; change one of them.",
    )


def sampling_config(config: SamplingConfig, settings: Mapping[str, Any]) -> SamplingConfig:
    """Returns `config` with some settings changed; a mapping {id: bias} may stand for logit_bias.

    Raises:
      UserError: A setting is unknown, has another type, or is out of range.
    """
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    fields = {name: getattr(config, name) for name in names} | dict(settings)
    # A scalar of numpy or jax is converted to the Python number.
    given = {
        key: value.item() if getattr(value, "shape", None) == () else value for key, value in fields.items()
    }
    biases = given["logit_bias"]
    if isinstance(biases, Mapping):
        given["logit_bias"] = [{"token": token, "bias": bias} for token, bias in biases.items()]
    elif isinstance(biases, list | tuple):
        given["logit_bias"] = [dataclasses.asdict(x) if isinstance(x, TokenBias) else x for x in biases]
    checked = from_dict(SamplingConfig, given, "sampling settings")
    validate_sampling(checked)
    return checked


def sampling_configs(
    config: SamplingConfig | Sequence[SamplingConfig] | None, settings: Mapping[str, Any], prompts: int
) -> list[SamplingConfig]:
    """Returns the config of each prompt: `config`, or its entry for the prompt, with some settings changed.

    Raises:
      UserError: as `sampling_config`; there is not one entry for each prompt; they differ in batch_size.
    """
    if config is None or isinstance(config, SamplingConfig):
        return [sampling_config(config or SamplingConfig(), settings)] * prompts
    configs = [sampling_config(of_prompt, settings) for of_prompt in config]
    _require(
        len(configs) == prompts,
        f"config has {len(configs)} entries for {prompts} prompts; give one, or one for each.",
    )
    sizes = sorted({of_prompt.batch_size for of_prompt in configs})
    _require(
        len(sizes) <= 1,
        f"the configs have batch_size {' and '.join(map(str, sizes))}, but all prompts share one; pass "
        "batch_size as a setting of the call.",
    )
    return configs


def validate_sampling(config: SamplingConfig) -> None:
    """Raises UserError, which names the setting, if one is out of range."""
    validate_bounds(config)
    _require(all(config.stop), "stop holds an empty text, which would end every continuation; leave it out.")


def validate_stream(config: SamplingConfig) -> None:
    """Raises UserError if a config asks for more than the text of one continuation."""
    plain = SamplingConfig()
    for name in ("samples", "top_log_probs", "prompt_log_probs"):
        _require(
            (value := getattr(config, name)) == getattr(plain, name),
            f"{name} is {value}, but a stream or dialogue shows the text of one continuation; leave it out.",
        )


def validate_sample(config: SampleConfig) -> None:
    """Raises UserError, which names the settings, if one is invalid or several contradict each other."""
    validate_sampling(config)
    _require(all(config.prompt), "prompt holds an empty text; give it a text to continue, or leave it out.")
    if config.stream:
        validate_stream(config)
        _require(not config.json, "stream prints text as it is made, and json prints objects; leave one out.")
    _require(
        not (config.precompile and (config.prompt or config.prompt_file)),
        "precompile compiles for prompts of every length; leave out prompt and prompt_file.",
    )
    _validate_compute(config.compute)
    validate_mesh(config.mesh)


def validate_chat(config: ChatConfig) -> None:
    """Raises UserError, which names the setting, if one is invalid."""
    validate_sampling(config)
    validate_stream(config)
    _validate_compute(config.compute)
    validate_mesh(config.mesh)


def validate_verify(config: VerifyConfig) -> None:
    """Raises UserError, which names the setting, if one is invalid."""
    _require(bool(config.prompt), "prompt is empty; give it a text, or leave it out.")
    _require(
        config.compute.dtype != "float64",
        "compute.dtype is float64, but what is compared with transformers is float32 or bfloat16; take one.",
    )
    _require(config.tokens > 1, f"tokens is {config.tokens}, but two are needed to predict one.")
    validate_mesh(config.mesh)


def _validate_hosts(hosts: HostsConfig) -> None:
    if hosts.coordinator:
        _require(
            re.fullmatch(r"\S+:\d+", hosts.coordinator) is not None,
            f"hosts.coordinator is {hosts.coordinator}, but must be HOST:PORT.",
        )
        _require(hosts.count > 0, "hosts.coordinator is set, but hosts.count is not; give both.")
        _require(
            hosts.index < hosts.count,
            f"hosts.index is {hosts.index}, but {hosts.count} processes are numbered from 0.",
        )
    else:
        _require(
            hosts.count <= 1 and hosts.index == 0,
            f"hosts.count is {hosts.count} and hosts.index {hosts.index}, but no hosts.coordinator is named; "
            "name it, or leave all three out where they are found automatically.",
        )


def profiled_steps(profile: str) -> range:
    """Returns the steps that the setting `profile` names; an empty range if it is empty.

    Raises:
      UserError: `profile` is neither a step nor FIRST:LAST.
    """
    if not profile:
        return range(0)
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", profile)
    steps = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    _require(len(steps) > 0 and steps[0] > 0, f"profile is {profile}, but must be a step or FIRST:LAST.")
    return steps


def validate_mesh(mesh: MeshConfig) -> None:
    """Raises UserError if the size of an axis is invalid, or more than one axis is -1.

    If mesh.cpu_devices is set, the axes must also fit that number of devices.
    """
    validate_bounds(mesh, "mesh.")
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        _require(size != 0, f"mesh.{axis} is 0, but must be 1 or more, or -1 for all that are left.")
    free = [axis for axis, size in sizes.items() if size == -1]
    _require(
        len(free) <= 1, f"mesh.{' and mesh.'.join(free)} are both -1; only one axis can take what is left."
    )
    if mesh.cpu_devices:
        mesh_shape(mesh, mesh.cpu_devices)


def mesh_text(shape: Mapping[str, int]) -> str:
    """Describes a mesh as `data 1 x fsdp 8 x tensor 1`. Slices are included if there are several."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if axis != "slice" or size != 1)


def mesh_shape(mesh: MeshConfig, device_count: int) -> tuple[int, int, int, int]:
    """Returns the sizes of the axes slice, data, fsdp and tensor on `device_count` devices.

    Raises:
      UserError: The axes need more devices than there are, leave some unused, or do not divide their number.
    """
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    asked = mesh_text(dict(zip(MESH_AXES, sizes, strict=True)))
    _require(
        fixed <= device_count,
        f"the mesh ({asked}) needs {fixed} devices, but there {'is' if device_count == 1 else 'are'} "
        f"{device_count}; make an axis smaller, or set mesh.cpu_devices.",
    )
    _require(
        device_count % fixed == 0 and (-1 in sizes or fixed == device_count),
        f"the mesh ({asked}) does not use exactly the {device_count} devices there are; "
        "set one axis to -1 to take what is left, or mesh.cpu_devices to use fewer.",
    )
    slices, data, fsdp, tensor = (device_count // fixed if size == -1 else size for size in sizes)
    return slices, data, fsdp, tensor


def validate_on_devices(config: TrainingConfig, device_count: int) -> None:
    """Checks the batch size against the config's mesh on `device_count` devices.

    Raises:
      UserError: The rows cannot be divided equally among the devices.
    """
    slices, data, fsdp, _ = mesh_shape(config.mesh, device_count)
    parts = slices * data * fsdp * config.optimizer.accumulation_steps
    over = mesh_text({"slice": slices, "data": data, "fsdp": fsdp})
    _require(
        config.data.batch_size % parts == 0,
        f"data.batch_size is {config.data.batch_size}, which {over} x accumulation_steps "
        f"{config.optimizer.accumulation_steps} = {parts} does not divide; "
        f"use {-(-config.data.batch_size // parts) * parts}.",
    )
