"""What a model adds to a prompt, as it grows."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

FinishReason = Literal["stop", "length", "context"]


@dataclasses.dataclass
class Completion:
    """The new tokens of one prompt, without the one that ended them."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    """Nats, under the model's own distribution."""
    finish_reason: FinishReason | None = None
    """An end token came, max_new_tokens were made, or the context is full; None until then."""

    def add(
        self, token_ids: Sequence[int], log_probs: Sequence[float], finish_reason: FinishReason | None
    ) -> bool:
        """Append new tokens.

        Args:
          token_ids, log_probs: of the new tokens.
          finish_reason: why these are the last ones, or None.

        Returns:
          Whether the completion needs no further token.
        """
        self.token_ids += token_ids
        self.log_probs += log_probs
        self.finish_reason = finish_reason
        return False
