"""Dialogues as token ids: the turn format that Gemma's instruction-tuned models were trained with.

    <bos><start_of_turn>user
    TEXT<end_of_turn>
    <start_of_turn>model
    TEXT<end_of_turn>

A dialogue is a list of messages `{"role": ..., "content": ...}`, as most data sets and servers write it.
"""

from collections.abc import Mapping, Sequence

from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer

# What other formats call the two that speak here.
ROLES = {"user": "user", "model": "model", "assistant": "model"}
SYSTEM = "system"

Message = Mapping[str, str]


def turns(messages: Sequence[Message], *, merge_system: bool = False) -> list[tuple[str, str]]:
    """The turns of a dialogue: role, `user` or `model`, and text without white space around it.

    Args:
      messages: user first, then in turn.
      merge_system: put a system message in front of the first user turn, an empty line between them; the
        format has no place of its own for one.

    Raises:
      UserError: no message, one without a text, an unknown role, roles out of turn, or a system message that
        is not to be merged.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise UserError(
                f"the message {str(message):.80} has no text; write {{'role': ..., 'content': TEXT}}."
            )
    instruction = ""
    if messages and messages[0].get("role") == SYSTEM:
        if not merge_system:
            raise UserError(
                "the dialogue begins with a system message, for which Gemma has no turn; "
                "ask to merge it into the first user turn, or leave it out."
            )
        instruction, messages = messages[0]["content"].strip(), messages[1:]
    if not messages:
        raise UserError("the dialogue has no turn; begin it with one of the user.")
    result = []
    for index, message in enumerate(messages):
        role, expected = message.get("role"), ("user", "model")[index % 2]
        if not isinstance(role, str) or ROLES.get(role) != expected:
            raise UserError(
                f"turn {index + 1} of the dialogue is of {str(role):.40}, but must be of the "
                f"{expected}: user and model (or assistant) take turns, and the user begins."
            )
        result.append((expected, message["content"].strip()))
    if instruction:
        result[0] = ("user", f"{instruction}\n\n{result[0][1]}".strip())
    return result


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Message], *, answer: bool, merge_system: bool = False
) -> list[int]:
    """Token ids of a dialogue, from `<bos>` on. Nothing in the texts becomes a control token.

    Args:
      tokenizer: of the model.
      messages: as for `turns`.
      answer: open a turn of the model at the end, for it to fill.
      merge_system: as for `turns`.

    Raises:
      UserError: as `turns`; or an answer is wanted where the last turn is the model's own.
    """
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    spoken = turns(messages, merge_system=merge_system)
    if answer and spoken[-1][0] == "model":
        raise UserError("the dialogue ends with a turn of the model; add one of the user to be answered.")
    newline = tokenizer.encode("\n")
    ids = [tokenizer.bos_id]
    for role, text in spoken:
        ids += [start, *tokenizer.encode(role), *newline, *tokenizer.encode_typed(text), end, *newline]
    if answer:
        ids += [start, *tokenizer.encode("model"), *newline]
    return ids
