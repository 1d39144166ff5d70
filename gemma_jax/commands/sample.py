"""`gemma sample CHECKPOINT --prompt TEXT`: continues prompts."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_jax.config import (
    LoadConfig,
    SampleConfig,
    SamplingConfig,
    read_command,
    sampling_config,
    sampling_configs,
    validate_sample,
)
from gemma_jax.errors import UserError
from gemma_jax.paths import parse_json, read_text
from gemma_jax.streams import progress, tell_terminal

if TYPE_CHECKING:
    from gemma_jax.api import Gemma
    from gemma_jax.model import ModelSpec


def load_gemma(checkpoint: str, config: LoadConfig) -> "Gemma":
    """Loads a model with its tokenizer.

    Raises:
      UserError: The checkpoint has no tokenizer, or for the same reasons as in `Gemma.from_pretrained`.
    """
    from gemma_jax.api import Gemma
    from gemma_jax.pretrained.checkpoint import require_tokenizer

    require_tokenizer(checkpoint)
    tuned = config.is_instruction_tuned
    progress(f"loading {checkpoint}")
    return Gemma.from_pretrained(
        checkpoint,
        mesh=config.mesh,
        compute=config.compute,
        instruction_tuned=tuned,
        quantization=config.quantization,
    )


def read_prompts(config: SampleConfig) -> tuple[list[str], list[SamplingConfig]]:
    """Returns the prompts of the command line and of prompt_file, and the settings of each.

    Raises:
      UserError: The file cannot be read, is no text, or has a line that is not an object with a prompt and
        settings.
    """
    prompts, configs = [*config.prompt], [sampling_config(config, {})] * len(config.prompt)
    name = config.prompt_file
    lines: list[str] = []
    if name:
        text = sys.stdin.read() if name == "-" else read_text(Path(name).expanduser())
        if config.json if name == "-" else name.endswith(".jsonl"):
            lines = text.split("\n")
        else:
            prompts, configs = [*prompts, text.removesuffix("\n")], [*configs, sampling_config(config, {})]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {'standard input' if name == '-' else name}"
        entry = parse_json(line, where)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
            raise UserError(f'{where} is no object with a prompt; write {{"prompt": TEXT}}.')
        prompts.append(entry.pop("prompt"))
        try:
            configs.append(sampling_config(config, entry))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not config.json and any(x.top_log_probs or x.prompt_log_probs for x in configs):
        raise UserError("top_log_probs and prompt_log_probs are printed by --json only; add it.")
    return prompts, sampling_configs(configs, {}, len(configs))


def abstract_model(checkpoint: str, config: SampleConfig) -> tuple["ModelSpec", tuple[int, ...]]:
    """Returns the model of a checkpoint and its end tokens; the weights are not read."""
    from gemma_jax.model import ModelSpec
    from gemma_jax.pretrained.checkpoint import open_checkpoint
    from gemma_jax.sharding import make_mesh

    found = open_checkpoint(checkpoint)
    compute, kind = found.compute(config.compute), found.kind(config.quantization)
    spec = ModelSpec(found.config, compute, make_mesh(config.mesh), kind)
    return spec, found.end_tokens(config.is_instruction_tuned)


def encoded_prompts(
    checkpoint: str, config: SampleConfig, texts: Sequence[str], configs: Sequence[SamplingConfig]
) -> tuple[list[list[int]], bool]:
    """Returns the token ids of each prompt, and whether they are turns of a dialogue.

    Raises:
      UserError: The model cannot take a prompt or a setting. Its weights have not been read yet.
    """
    from gemma_jax.data.chat import encode_prompt
    from gemma_jax.pretrained.checkpoint import require_tokenizer
    from gemma_jax.pretrained.end_tokens import END_OF_TURN
    from gemma_jax.sampling import Generator
    from gemma_jax.sampling.requests import requests_of

    (spec, ends), tokenizer = abstract_model(checkpoint, config), require_tokenizer(checkpoint)
    as_turn = END_OF_TURN in ends and not config.raw
    prompts = [encode_prompt(tokenizer, prompt, turn=as_turn) for prompt in texts]
    generator = Generator(spec, spec.params)
    generator.check_memory(prompts, configs)
    generator.check(requests_of(prompts, configs, ends))
    return prompts, as_turn


def run(arguments: Sequence[str], prog: str) -> int:
    """Print each prompt with its continuation, or one JSON object per line with `--json`.

    For an instruction-tuned model, each prompt is a turn of the user, unless `--raw` is passed.
    """
    (checkpoint,), config = read_command(
        arguments, prog, "CHECKPOINT", SampleConfig(), validate=validate_sample
    )
    if config.precompile:
        return compile_programs(checkpoint, config)
    texts, configs = read_prompts(config)
    if not all(texts) or not texts:
        raise UserError(f"there is nothing to continue; add --prompt TEXT (see `{prog} --help`).")
    one = len(texts) == configs[0].samples == 1
    if config.stream and not one:
        raise UserError("stream shows one continuation as it is made; give a single prompt.")

    prompts, as_turn = encoded_prompts(checkpoint, config, texts, configs)
    gemma = load_gemma(checkpoint, config)
    if as_turn:
        print(
            f"{checkpoint} is instruction-tuned, so its chat template is applied (--raw disables it)",
            file=sys.stderr,
        )
    progress("compiling and generating")
    watch = Watch()
    if config.stream or (one and not config.json and sys.stdout.isatty()):
        print(texts[0], end="\n" if as_turn else "", flush=True)
        made = ""
        for piece in gemma.stream(prompts[0], configs[0]):
            print(piece, end="", flush=True)
            made += piece
        print()
        watch.report(len(gemma.tokenizer.encode(made)))
        return 0
    generations = gemma.generate(prompts, configs)
    watch.report(sum(len(generation.token_ids) for generation in generations))
    places = [
        (number, sample, text)
        for number, (text, of_prompt) in enumerate(zip(texts, configs, strict=True), start=1)
        for sample in range(1, of_prompt.samples + 1)
    ]
    for (number, sample, text), generation in zip(places, generations, strict=True):
        if config.json:
            print(json.dumps({"prompt": text, "turn": as_turn, **dataclasses.asdict(generation)}))
            continue
        if len(places) > 1:  # a text may contain empty lines, so these cannot separate texts
            print(f"--- prompt {number}, sample {sample} ---")
        print(text + ("\n" if as_turn else "") + generation.text)
    return 0


def compile_programs(checkpoint: str, config: SampleConfig) -> int:
    """Compiles the programs of sampling, and prints how many there are."""
    import jax

    from gemma_jax.api import PROGRAMS
    from gemma_jax.sampling.precompile import precompile
    from gemma_jax.startup import keep_programs

    keep_programs(config.compute.compilation_cache, PROGRAMS)
    settings, watch = sampling_config(config, {}), Watch()
    spec, ends = abstract_model(checkpoint, config)
    progress(f"compiling for prompts of up to {spec.config.context_length - 1:,} tokens")
    count = precompile(spec, settings, ends, config.batch_size or 1)
    tell_terminal(watch.programs)
    print(f"{count} programs are in {jax.config.values['jax_compilation_cache_dir']}")
    return 0


class Watch:
    """Measures a command from now on: its time, and the programs that jax compiles meanwhile."""

    def __init__(self) -> None:
        import jax

        self._start, self._compiled, self._found, self._compiling = time.monotonic(), 0, 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiled, self._compiling = self._compiled + 1, self._compiling + duration_secs

    def _on_event(self, event: str, **_: object) -> None:
        self._found += event == "/jax/compilation_cache/cache_hits"

    @property
    def programs(self) -> str:
        """How many programs there were, in words."""
        seconds = f"{self._compiling:.1f} s"
        return f"{self._compiled} programs compiled or loaded in {seconds}, {self._found} of them loaded"

    def report(self, tokens: int) -> None:
        """Tells a terminal how fast tokens were made; the time for compiling does not count."""
        seconds = max(time.monotonic() - self._start - self._compiling, 1e-3)
        tell_terminal(
            f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second; {self.programs}"
        )
