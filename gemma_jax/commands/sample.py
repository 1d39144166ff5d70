"""`gemma sample CHECKPOINT --prompt TEXT`: continues prompts."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_jax.config import LoadConfig, SampleConfig, read_command, validate_sample
from gemma_jax.errors import UserError
from gemma_jax.streams import progress

if TYPE_CHECKING:
    from gemma_jax.api import Gemma


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


def encoded_prompts(checkpoint: str, config: SampleConfig) -> tuple[list[list[int]], bool]:
    """Returns the token ids of each prompt, and whether they are turns of a dialogue.

    Raises:
      UserError: The model cannot take a prompt or a setting. Its weights have not been read yet.
    """
    from gemma_jax.data.chat import encode_prompt
    from gemma_jax.model import ModelSpec
    from gemma_jax.pretrained.checkpoint import open_checkpoint, require_tokenizer
    from gemma_jax.pretrained.end_tokens import END_OF_TURN
    from gemma_jax.sampling import Generator
    from gemma_jax.sampling.requests import requests_of
    from gemma_jax.sharding import make_mesh

    found, tokenizer = open_checkpoint(checkpoint), require_tokenizer(checkpoint)
    ends = found.end_tokens(config.is_instruction_tuned)
    as_turn = END_OF_TURN in ends and not config.raw
    prompts = [encode_prompt(tokenizer, prompt, turn=as_turn) for prompt in config.prompt]
    spec = ModelSpec(found.config, config.compute, make_mesh(config.mesh), found.kind(config.quantization))
    generator = Generator(spec, spec.params)
    generator.check_memory(prompts, [config] * len(prompts))
    generator.check(requests_of(prompts, config, ends))
    return prompts, as_turn


def run(arguments: Sequence[str], prog: str) -> int:
    """Print each prompt with its continuation, or one JSON object per line with `--json`.

    For an instruction-tuned model, each prompt is a turn of the user, unless `--raw` is passed.
    """
    (checkpoint,), config = read_command(
        arguments, prog, "CHECKPOINT", SampleConfig(), validate=validate_sample
    )
    if not config.prompt:
        raise UserError(f"there is nothing to continue; add --prompt TEXT (see `{prog} --help`).")

    prompts, as_turn = encoded_prompts(checkpoint, config)
    gemma = load_gemma(checkpoint, config)
    if as_turn:
        print(
            f"{checkpoint} is instruction-tuned, so its chat template is applied (--raw disables it)",
            file=sys.stderr,
        )
    if config.stream:
        print(config.prompt[0], end="\n" if as_turn else "", flush=True)
        for piece in gemma.stream(prompts[0], config):
            print(piece, end="", flush=True)
        print()
        return 0
    repeated = [prompt for prompt in config.prompt for _ in range(config.samples)]
    progress("compiling and generating")
    generations = gemma.generate(prompts, config)
    for index, (prompt, generation) in enumerate(zip(repeated, generations, strict=True)):
        if config.json:
            print(json.dumps({"prompt": prompt, "turn": as_turn, **dataclasses.asdict(generation)}))
            continue
        if len(repeated) > 1:  # a text may contain empty lines, so these cannot separate texts
            number, sample = divmod(index, config.samples)
            print(f"--- prompt {number + 1}, sample {sample + 1} ---")
        print(prompt + ("\n" if as_turn else "") + generation.text)
    return 0
