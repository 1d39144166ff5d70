"""Incremental conversion of token ids to text: each id is decoded once, however long the text becomes."""

import bisect
import codecs
from collections.abc import Sequence

from gemma_jax.sampling.requests import Alternatives, Completion, FinishReason
from gemma_jax.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text, and holds back the bytes of a character that is not complete yet.

    Pieces decode independently of each other, except for a run of byte pieces, which is decoded as UTF-8.
    The first piece is no exception, because `Tokenizer` refuses models that strip a leading space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def add(self, id: int) -> str:
        """Adds an id, and returns the text that has become certain with it."""
        if id >= self._tokenizer.vocab_size:  # an embedding row that fine-tuning added; it has no text
            return self.flush()
        ids = [*self._held, id]
        certain = len(ids) - self._incomplete(ids)
        self._held = ids[certain:]
        return self._tokenizer.decode(ids[:certain]) if certain else ""

    def flush(self) -> str:
        """Returns the text of a character that remains incomplete: U+FFFD for each of its bytes."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held) if held else ""

    def _incomplete(self, ids: Sequence[int]) -> int:
        """Returns how many ids at the end are the beginning of a multi-byte character."""
        encoded = b""
        for id in reversed(ids):
            byte = self._tokenizer.byte(id)
            if byte is None:
                return 0
            encoded = bytes([byte]) + encoded
            if byte >= 0xC0:  # the first byte of a character; the following ones are 0x80 to 0xBF
                return len(encoded) if _begins_character(encoded) else 0
        return 0


def _begins_character(encoded: bytes) -> bool:
    """Returns whether these bytes are an incomplete UTF-8 character that further bytes could complete."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(encoded) == ""
    except UnicodeDecodeError:
        return False


class TextCompletion(Completion):
    """A completion that also has text, which is cut off before the first stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Args:
        tokenizer: The model's tokenizer.
        stop: Texts that end the completion. If there are several in the text, the one that ends first counts.
        """
        super().__init__()
        self._detokenizer, self._stop = Detokenizer(tokenizer), tuple(stop)
        self._pieces: list[str] = []
        self._streamed = 0  # pieces that `take` has returned
        self._tail = ""  # the text after the pieces; it may be the beginning of a stop text
        self._lengths = [0]  # [n]: length of the text after n tokens, in characters

    @property
    def text(self) -> str:
        """The certain part of the text so far, and the whole text once the completion has ended."""
        return "".join(self._pieces)

    def take(self) -> str:
        """Returns the text that has become certain since the last call."""
        pieces = self._pieces[self._streamed :]
        self._streamed = len(self._pieces)
        return "".join(pieces)

    def add(
        self,
        token_ids: Sequence[int],
        log_probs: Sequence[float],
        finish_reason: FinishReason | None,
        top_log_probs: Sequence[Alternatives] = (),
    ) -> bool:
        """Appends new tokens like `Completion.add`; returns True if a stop text has occurred."""
        super().add(token_ids, log_probs, finish_reason, top_log_probs)
        for id in token_ids:
            new = self._detokenizer.add(id)
            self._lengths.append(self._lengths[-1] + len(new))
            if new and self._ends_with(self._tail + new):
                return True
        if finish_reason:
            self._pieces.append(self._tail + self._detokenizer.flush())
        return False

    def _ends_with(self, text: str) -> bool:
        """Replaces the tail by `text`; if that contains a stop text, cuts it off there and returns True."""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            _, start = min(found)
            # Keep only the tokens that are needed for the text before the stop text.
            length = self._lengths[-1] - len(text) + start
            needed = bisect.bisect_left(self._lengths, length)
            del self.token_ids[needed:], self.log_probs[needed:], self.top_log_probs[needed:]
            self.finish_reason = "stop"
        else:
            start = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pieces.append(text[:start])
        self._tail = text[start:]
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` are the beginning, but not all, of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
