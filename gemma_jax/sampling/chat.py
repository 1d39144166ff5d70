"""A dialogue with an instruction-tuned model, which remembers what was said."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gemma_jax.config import SamplingConfig, sampling_config
from gemma_jax.data.chat import SYSTEM, Message, encode_dialogue
from gemma_jax.errors import UserError
from gemma_jax.sampling.generate import FinishReason
from gemma_jax.tokenizer import Tokenizer

# (prompt ids, settings) -> pieces of the continuation; the last comes with the reason of its end
Pieces = Callable[[Sequence[int], SamplingConfig], Iterator[tuple[str, FinishReason | None]]]

MAX_NEW_TOKENS = 1024  # of an answer, where nobody says


class Chat:
    """A dialogue: `send` a message and get the answer, or `stream` it.

    Make one with `Gemma.chat`. `history` is the list of messages so far, `{"role": "user" or "model",
    "content": TEXT}` in turn; it may be read, stored, and changed between two messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pieces: Pieces,
        context_length: int,
        system: str,
        history: Sequence[Message],
        config: SamplingConfig,
    ) -> None:
        """Args:
        tokenizer: of the model.
        pieces: continues a prompt.
        context_length: of the model, tokens.
        system: an instruction that stands in front of the first user turn.
        history: messages of an earlier dialogue to go on from.
        config: of every answer.
        """
        self.history: list[Message] = list(history)
        self.finish_reason: FinishReason | None = None
        """Why the last answer ended: "stop", "length", "context"; None where it was stopped from outside."""
        self._tokenizer, self._pieces, self._context_length = tokenizer, pieces, context_length
        self._system = [{"role": SYSTEM, "content": system}] if system else []
        self._config = config

    def send(self, message: str, **settings: Any) -> str:
        """The model's answer to a message; both go into the history.

        Args:
          message: of the user; control tokens in it stay text.
          **settings: those of `Gemma.generate` but for samples; they override those of the chat.

        Raises:
          UserError: the dialogue fills the context, or a setting is out of range; the history is unchanged.
        """
        return "".join(self.stream(message, **settings))

    def stream(self, message: str, **settings: Any) -> Iterator[str]:
        """The answer piece by piece while it is made; arguments and errors as for `send`.

        When it is left before its end, what was made so far is the answer that the history keeps.
        """
        said = [*self.history, {"role": "user", "content": message}]
        prompt = encode_dialogue(self._tokenizer, [*self._system, *said], answer=True, merge_system=True)
        if len(prompt) >= self._context_length:
            raise UserError(
                f"with this message the dialogue has {len(prompt)} tokens, but the model's context holds "
                f"{self._context_length}, the answer included; reset the dialogue or shorten the message."
            )
        # Another seed for each turn: the same one would draw alike in every answer.
        seed = (self._config.seed + len(self.history) // 2) % 2**32
        config = sampling_config(self._config, {"seed": seed, **settings})
        answer, finish_reason, ended = "", None, False
        try:
            for piece, reason in self._pieces(prompt, config):
                answer, finish_reason = answer + piece, reason
                if piece:
                    yield piece
            ended = True
        finally:
            self.finish_reason = finish_reason if ended else None
            if ended or answer:
                self.history = [*said, {"role": "model", "content": answer}]

    def reset(self) -> None:
        """Forget what was said; the system instruction stays."""
        self.history, self.finish_reason = [], None
