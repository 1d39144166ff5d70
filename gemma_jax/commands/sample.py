"""`gemma sample CHECKPOINT --prompt TEXT`: continue prompts."""

import dataclasses
import json
from collections.abc import Sequence

from gemma_jax.config import SampleConfig, SamplingConfig, parse, validate_sample
from gemma_jax.errors import UserError


def run(arguments: Sequence[str], prog: str) -> int:
    """Print each prompt with its continuation, or a JSON object a line with `--json`."""
    if not arguments or arguments[0].startswith("-"):
        parse(SampleConfig(), [a for a in arguments if a in ("-h", "--help")], f"{prog} CHECKPOINT")
        raise UserError(f"name a checkpoint first: {prog} CHECKPOINT --prompt TEXT.")
    checkpoint, *rest = arguments
    config = parse(SampleConfig(), rest, f"{prog} CHECKPOINT")
    validate_sample(config)
    if not config.prompt:
        raise UserError(f"there is nothing to continue; add --prompt TEXT (see `{prog} --help`).")

    from gemma_jax.api import Gemma

    gemma = Gemma.from_pretrained(checkpoint, mesh=config.mesh, compute=config.compute)
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(SamplingConfig)}
    if config.stream:
        del settings["samples"]
        print(config.prompt[0], end="", flush=True)
        for piece in gemma.stream(config.prompt[0], **settings):
            print(piece, end="", flush=True)
        print()
        return 0
    prompts = [prompt for prompt in config.prompt for _ in range(config.samples)]
    generations = gemma.generate(config.prompt, **settings)
    for index, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        if config.json:
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(generation)}))
        else:
            print(("\n" if index else "") + prompt + generation.text)
    return 0
