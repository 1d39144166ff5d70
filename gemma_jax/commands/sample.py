"""`gemma sample CHECKPOINT --prompt TEXT`: continue prompts."""

import dataclasses
import json
from collections.abc import Sequence

from gemma_jax.config import SampleConfig, parse, validate_sample
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
    generations = gemma.generate(
        config.prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    for index, (prompt, generation) in enumerate(zip(config.prompt, generations, strict=True)):
        if config.json:
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(generation)}))
        else:
            print(("\n" if index else "") + prompt + generation.text)
    return 0
