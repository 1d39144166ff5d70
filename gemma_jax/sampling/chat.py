"""A dialogue with an instruction-tuned model that keeps its history."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gemma_jax.config import SamplingConfig, sampling_config
from gemma_jax.data.chat import SYSTEM, Message, encode_turn, turns
from gemma_jax.errors import UserError
from gemma_jax.sampling.requests import FinishReason
from gemma_jax.tokenizer import Tokenizer

# (prompt ids, settings) -> pieces of the continuation; the last one comes with the finish reason
Pieces = Callable[[Sequence[int], SamplingConfig], Iterator[tuple[str, FinishReason | None]]]

MAX_NEW_TOKENS = 1024  # per answer, unless the user sets another limit


class Chat:
    """A dialogue: `send` a message and get the answer, or `stream` it.

    Make one with `Gemma.chat`. `history` is the list of messages so far, `{"role": "user" or "model",
    "content": TEXT}` in turn; the caller may read, store and change it between two messages.
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
        tokenizer: The model's tokenizer.
        pieces: The function that continues a prompt.
        context_length: The model's context length in tokens.
        system: An instruction that is put in front of the first user turn.
        history: The messages of an earlier dialogue to continue.
        config: The sampling settings of every answer.
        """
        self.history: list[Message] = list(history)
        self.finish_reason: FinishReason | None = None
        """Why the last answer ended: "stop", "length", "context"; None if it was stopped early."""
        self._tokenizer, self._pieces, self._context_length = tokenizer, pieces, context_length
        self._system = [{"role": SYSTEM, "content": system}] if system else []
        self._config = config
        self._encoded: tuple[list[tuple[str, str]], list[int]] = ([], [tokenizer.bos_id])

    def send(self, message: str, **settings: Any) -> str:
        """Returns the model's answer to a message, and appends both to the history.

        Args:
          message: The user's message; control tokens in it are treated as text.
          **settings: The settings of `Gemma.generate` except samples; they override those of the chat.

        Raises:
          UserError: the dialogue fills the context, or a setting is out of range; the history is unchanged.
        """
        return "".join(self.stream(message, **settings))

    def stream(self, message: str, **settings: Any) -> Iterator[str]:
        """Yields the answer piece by piece as it is generated; arguments and errors as for `send`.

        If the caller stops early, the history keeps the text generated so far as the answer.
        """
        said = [*self.history, {"role": "user", "content": message}]
        prompt = self._encode([*self._system, *said])
        if len(prompt) >= self._context_length:
            raise UserError(
                f"with this message the dialogue has {len(prompt)} tokens, but the model's context holds "
                f"{self._context_length}, the answer included; reset the dialogue or shorten the message."
            )
        # Each turn has its own seed. With the same seed every answer would use the same random numbers.
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

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids of a dialogue to answer; turns that were encoded before are not again."""
        spoken, (known, ids) = turns(messages, merge_system=True), self._encoded
        if spoken[: len(known)] != known:
            known, ids = [], [self._tokenizer.bos_id]
        for role, text in spoken[len(known) :]:
            header, content = encode_turn(self._tokenizer, role, text)
            ids = ids + header + content
        self._encoded = spoken, ids
        return ids + encode_turn(self._tokenizer, "model", "")[0]

    def reset(self) -> None:
        """Clears the history; the system instruction stays."""
        self.history, self.finish_reason = [], None
