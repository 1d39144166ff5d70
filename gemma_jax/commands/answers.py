"""Answers to fixed prompts at each evaluation of a run."""

from collections.abc import Sequence

import jax
from flax import nnx

from gemma_jax.config import SamplingConfig, TrainingConfig
from gemma_jax.data.chat import encode_prompt
from gemma_jax.model import ModelSpec
from gemma_jax.sampling import Generator, TextCompletion, complete_requests
from gemma_jax.sampling.requests import requests_of
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.evaluation import Evaluator, Numbers, StopRequested

MOST_TOKENS = 128


def answers_to(
    config: TrainingConfig, spec: ModelSpec, tokenizer: Tokenizer, end_tokens: Sequence[int]
) -> list[Evaluator]:
    """Returns the evaluator that prints the likeliest answer to each prompt, if there are any.

    A prompt is a turn of a dialogue if `<end_of_turn>` is among the end tokens, or else plain text. A job of
    several processes prints nothing, because none of them has the whole model.
    """
    every = config.evaluation.every
    if not config.evaluation.prompts or not every or jax.process_count() > 1:
        return []
    chat = tokenizer.end_of_turn_id in end_tokens
    ids = [encode_prompt(tokenizer, prompt, turn=chat) for prompt in config.evaluation.prompts]
    requests = requests_of(ids, SamplingConfig(max_new_tokens=MOST_TOKENS), end_tokens)
    generator: Generator | None = None

    texts: dict[str, str] = {}

    def measure(params: nnx.State, stop_requested: StopRequested) -> Numbers | None:
        nonlocal generator
        generator = generator or Generator(spec, params)
        generator.use(params)
        completions = [TextCompletion(tokenizer, ()) for _ in requests]
        for _ in complete_requests(generator, requests, completions):
            if stop_requested():
                return None
        texts.update(zip(config.evaluation.prompts, (made.text for made in completions), strict=True))
        return {}

    return [Evaluator("answers", every, measure, texts)]
