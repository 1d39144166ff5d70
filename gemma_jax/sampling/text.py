"""Text of token ids that arrive a few at a time: each id is decoded once, however long the text becomes."""

import bisect
import codecs
from collections.abc import Sequence

from gemma_jax.sampling.generate import Completion, FinishReason
from gemma_jax.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text, and holds back the bytes of a character that is not complete yet.

    Pieces decode independently of each other, except for a run of byte pieces, which is read as UTF-8.
    `Tokenizer` accepts no model that strips a leading space, so the first piece is no exception.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def add(self, id: int) -> str:
        """The text that is certain now and was not before."""
        if id >= self._tokenizer.vocab_size:  # of a row that fine-tuning has added: it has no text
            return self.flush()
        ids = [*self._held, id]
        certain = len(ids) - self._incomplete(ids)
        self._held = ids[certain:]
        return self._tokenizer.decode(ids[:certain]) if certain else ""

    def flush(self) -> str:
        """The text of a character that stays incomplete: U+FFFD for each of its bytes."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held) if held else ""

    def _incomplete(self, ids: Sequence[int]) -> int:
        """How many ids at the end are the beginning of a character of several bytes."""
        encoded = b""
        for id in reversed(ids):
            byte = self._tokenizer.byte(id)
            if byte is None:
                return 0
            encoded = bytes([byte]) + encoded
            if byte >= 0xC0:  # the first byte of a character; those that follow it are from 0x80 to 0xBF
                return len(encoded) if _begins_character(encoded) else 0
        return 0


def _begins_character(encoded: bytes) -> bool:
    """Whether further bytes could make these a character of UTF-8, and without them they are none."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(encoded) == ""
    except UnicodeDecodeError:
        return False


class TextCompletion(Completion):
    """A completion with its text, which ends before the first stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Args:
        tokenizer: of the model.
        stop: texts that end the completion; the one whose end comes first counts.
        """
        super().__init__()
        self._detokenizer, self._stop = Detokenizer(tokenizer), tuple(stop)
        self._pieces: list[str] = []
        self._streamed = 0  # pieces
        self._tail = ""  # behind the pieces: what may become the beginning of a stop text
        self._lengths = [0]  # of the text after so many tokens, in characters

    @property
    def text(self) -> str:
        """What is certain of the text so far, and all of it at the end."""
        return "".join(self._pieces)

    def take(self) -> str:
        """What has become certain since the last call."""
        pieces = self._pieces[self._streamed :]
        self._streamed = len(self._pieces)
        return "".join(pieces)

    def add(
        self, token_ids: Sequence[int], log_probs: Sequence[float], finish_reason: FinishReason | None
    ) -> bool:
        """Append new tokens, as `Completion.add`; True where a stop text has come."""
        super().add(token_ids, log_probs, finish_reason)
        for id in token_ids:
            new = self._detokenizer.add(id)
            self._lengths.append(self._lengths[-1] + len(new))
            if new and self._ends_with(self._tail + new):
                return True
        if finish_reason:
            self._pieces.append(self._tail + self._detokenizer.flush())
        return False

    def _ends_with(self, text: str) -> bool:
        """Append text that replaces the tail; True where it holds a stop text, which is cut off."""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            _, start = min(found)
            # The tokens that are needed for the text before the stop, and no more.
            length = self._lengths[-1] - len(text) + start
            needed = bisect.bisect_left(self._lengths, length)
            del self.token_ids[needed:], self.log_probs[needed:]
            self.finish_reason = "stop"
        else:
            start = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pieces.append(text[:start])
        self._tail = text[start:]
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning, but not the whole, of a stop text."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
