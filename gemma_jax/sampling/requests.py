"""Requests and their completions: what is asked of a `Generator`, and what comes back.

Shape legend: B slots, E end tokens, K biased tokens.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gemma_jax.config import SamplingConfig, TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.sampling.decode import SlotSettings
from gemma_jax.sampling.select import Options

FinishReason = Literal["stop", "length", "context"]
Alternatives = list[tuple[int, float]]  # token ids with their log-probabilities, the likeliest first


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt for which to generate one continuation."""

    token_ids: Sequence[int]
    config: SamplingConfig
    end_tokens: Sequence[int]
    prompt: int = 0  # the prompt's index; with the seed and `sample` it determines the random numbers
    sample: int = 0
    adapter: int = 0

    @property
    def beginning(self) -> tuple[Hashable, ...]:
        """What the keys and values of the prompt depend on."""
        return self.adapter, *self.token_ids

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the logits, by token; -inf for the forbidden ones."""
        biases: dict[int, float] = collections.defaultdict(float)
        for entry in self.config.logit_bias:
            biases[entry.token] += entry.bias
        return biases | dict.fromkeys(self.config.forbidden_tokens, -math.inf)


@dataclasses.dataclass
class Completion:
    """The new tokens of one prompt, without the end token."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    """Nats, under the model's own distribution."""
    finish_reason: FinishReason | None = None
    """Why generation ended: an end token ("stop"), max_new_tokens ("length") or a full context ("context").

    None until then.
    """
    top_log_probs: list[Alternatives] = dataclasses.field(default_factory=list)
    """For each token the likeliest ones; empty if they were not asked for."""

    @property
    def text(self) -> str:
        """The text so far; empty where there is no tokenizer."""
        return ""

    def add(
        self,
        token_ids: Sequence[int],
        log_probs: Sequence[float],
        finish_reason: FinishReason | None,
        top_log_probs: Sequence[Alternatives] = (),
    ) -> bool:
        """Appends new tokens.

        Args:
          token_ids, log_probs: The ids and log-probabilities of the new tokens.
          finish_reason: Why generation ends with these tokens, or None if it does not.
          top_log_probs: The likeliest tokens at the place of each new one, if they were asked for.

        Returns:
          Whether the completion itself stops here and needs no further token.
        """
        self.token_ids += token_ids
        self.log_probs += log_probs
        self.top_log_probs += top_log_probs
        self.finish_reason = finish_reason
        return False


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation of a prompt."""

    text: str  # empty where the model has no tokenizer
    token_ids: list[int]  # without the end token
    log_probs: list[float]  # one per token, under the model's own distribution, in nats
    finish_reason: FinishReason  # "stop": an end token; "length": max_new_tokens; "context": no room left
    top_log_probs: list[Alternatives]  # for each token the likeliest ones; empty unless asked for
    prompt_log_probs: list[float]  # as `Gemma.score` returns them; empty unless asked for

    @classmethod
    def of(cls, made: Completion, prompt_log_probs: list[float]) -> "Generation":
        """Returns what a completion holds at its end."""
        assert made.finish_reason is not None
        of_tokens = (made.token_ids, made.log_probs, made.finish_reason, made.top_log_probs)
        return cls(made.text, *of_tokens, prompt_log_probs)


def requests_of(
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | Sequence[SamplingConfig],
    end_tokens: Sequence[int],
    adapters: Sequence[int] = (),
) -> list[Request]:
    """Returns a request for every sample of every prompt; the samples of one prompt are adjacent.

    `config` is that of all prompts or has one for each; so `adapters`, the index of each prompt's adapter,
    which may also be empty: then all have the first one.
    """
    configs = [config] * len(prompts) if isinstance(config, SamplingConfig) else config
    adapters = adapters or [0] * len(prompts)
    return [
        Request(token_ids, config, (*end_tokens, *config.end_tokens), prompt, sample, adapter)
        for prompt, (token_ids, config, adapter) in enumerate(zip(prompts, configs, adapters, strict=True))
        for sample in range(config.samples)
    ]


def indices_of(known: Sequence[str], adapter: str | Sequence[str] | None, count: int) -> list[int]:
    """Returns the index of the adapter of each of `count` prompts: -1 is the model without one.

    Args:
      known: The names of the model's adapters. An empty name is that of the model's own.
      adapter: The name of one, or a name for each prompt; None takes the model's own, if there is one.
      count: The number of prompts.

    Raises:
      UserError: There is no adapter of a name, or not one name for each prompt.
    """
    if adapter is None:
        return [0 if "" in known else -1] * count
    names = [adapter] * count if isinstance(adapter, str) else list(adapter)
    if len(names) != count:
        raise UserError(f"adapter has {len(names)} names for {count} prompts; give one name, or one each.")
    for name in names:
        if name and name not in known:
            loaded = ", ".join(filter(None, known)) or "none"
            raise UserError(f"there is no adapter {name!r}; this model was loaded with: {loaded}.")
    return [known.index(name) if name else -1 for name in names]


def bucket(size: int) -> int:
    """Rounds up to a power of two, at least 16: a program is compiled for each bucket, not for each size."""
    return max(16, 1 << (size - 1).bit_length())


def row_bucket(rows: int, parts: int) -> int:
    """Rounds up to 1, 2, 3, 4, 6, 8, 12, 16 ... rows for each of the parts that a batch is split into."""
    rows = -(-rows // parts)
    step = 1 << max(0, (rows - 1).bit_length() - 2)
    return -(-rows // step) * step * parts


class Widths(NamedTuple):
    """Sizes that all slots of a batch share: the smallest buckets that hold those of each request.

    What no request uses has the size 0, and is not computed.
    """

    ends: int = 16  # E
    biases: int = 0  # K
    top: int = 0  # alternatives of each token
    penalty: bool = False  # whether there is a repetition penalty
    guesses: int = 0  # tokens that each step guesses

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Widths":
        """Returns the sizes for these requests."""

        def width(size: Callable[[Request], int]) -> int:
            return bucket(most) if (most := max(map(size, requests))) else 0

        return cls(
            bucket(max(len(request.end_tokens) for request in requests)),
            width(lambda request: len(request.biases)),
            width(lambda request: request.config.top_log_probs),
            any(request.config.repetition_penalty != 1 for request in requests),
            max(request.config.prompt_lookup for request in requests),
        )


def limit_of(request: Request, context_length: int) -> int:
    """Returns how many new tokens a request may get."""
    return min(request.config.max_new_tokens, context_length - len(request.token_ids))


def slot_settings(
    requests: Sequence[Request], rows: int, widths: Widths, context_length: int
) -> SlotSettings:
    """Returns the settings of the slots as numpy arrays; slots without a request are done from the start.

    Args:
      requests: The requests, at most `rows`.
      rows: The number of slots.
      widths: At least those of the requests.
      context_length: The model's context length in tokens.
    """
    unused = Request((), SamplingConfig(), ())
    empty = rows - len(requests)
    requests = [*requests, *[unused] * empty]

    def column(of: Callable[[Request], Any], dtype: Any = np.int32) -> Any:
        return np.array([of(request) for request in requests], dtype)

    def filled(values: Iterable[float], width: int, padding: float) -> list[float]:
        values = list(values)
        return [*values, *[padding] * (width - len(values))]

    room = column(lambda r: limit_of(r, context_length))
    room[len(requests) - empty :] = 0
    options = Options(
        temperature=column(lambda r: r.config.temperature, np.float32),
        top_k=column(lambda r: r.config.top_k),
        top_p=column(lambda r: r.config.top_p, np.float32),
        min_p=column(lambda r: r.config.min_p, np.float32),
        penalty=column(lambda r: r.config.repetition_penalty, np.float32),
    )
    if widths.biases:
        options = options._replace(
            bias_tokens=column(lambda r: filled(r.biases, widths.biases, np.iinfo(np.int32).max)),
            biases=column(lambda r: filled(r.biases.values(), widths.biases, 0), np.float32),
        )
    return SlotSettings(
        prompt_lengths=column(lambda r: len(r.token_ids)),
        limits=room,
        end_tokens=column(lambda r: filled(r.end_tokens, widths.ends, -1)),
        random_ids=column(lambda r: (r.config.seed, r.prompt, r.sample), np.uint32),
        adapters=column(lambda r: r.adapter),
        options=options,
    )


def padded(sequences: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sequences as [rows, width], padded with zeros, and their lengths [rows]; both int32."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def check_ids(ids: Sequence[int], config: TransformerConfig, new: int = 0) -> None:
    """Checks the length and the ids of a sequence.

    Raises:
      UserError: the sequence is empty, has no room for `new` more tokens, or has an id out of range.
    """
    most = config.context_length - new
    if not 0 < len(ids) <= most:
        raise UserError(
            f"a sequence has {len(ids)} tokens, but must have 1 to {most}: the model's context holds "
            f"{config.context_length}, new ones included; begin it with <bos>, or shorten it."
        )
    wrong = next((id for id in ids if not 0 <= id < config.vocab_size), None)
    if wrong is not None:
        last = config.vocab_size - 1
        raise UserError(f"token id {wrong} is out of range; the model's ids go from 0 to {last}.")


def check_options(config: SamplingConfig, vocab_size: int) -> None:
    """Checks the settings that depend on the model's vocabulary.

    Raises:
      UserError: a token id is out of range, no token may be chosen, or more tokens than there are shall be
        listed.
    """
    fields = {
        "logit_bias": [entry.token for entry in config.logit_bias],
        "forbidden_tokens": config.forbidden_tokens,
        "end_tokens": config.end_tokens,
    }
    last = vocab_size - 1
    for name, ids in fields.items():
        if (largest := max(ids, default=0)) > last:
            raise UserError(
                f"{name} has {largest}, which is out of range; the model's ids go from 0 to {last}."
            )
    if len(set(config.forbidden_tokens)) == vocab_size:
        raise UserError(f"forbidden_tokens has all {vocab_size} tokens of the model; leave out some of them.")
    if config.top_log_probs > vocab_size:
        raise UserError(f"top_log_probs is {config.top_log_probs}, but the model has {vocab_size} tokens.")
