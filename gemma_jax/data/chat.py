"""Encodes dialogues as token ids, in the turn format that Gemma's instruction-tuned models were trained on.

    <bos><start_of_turn>user
    TEXT<end_of_turn>
    <start_of_turn>model
    TEXT<end_of_turn>

A dialogue is a list of messages `{"role": ..., "content": ...}`, as in most data sets and servers.
"""

from collections.abc import Mapping, Sequence

from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer

# Maps the role names of this and other formats to the two roles of Gemma's format.
ROLES = {"user": "user", "model": "model", "assistant": "model"}
SYSTEM = "system"

Message = Mapping[str, str]


def turns(messages: Sequence[Message], *, merge_system: bool = False) -> list[tuple[str, str]]:
    """Returns the turns of a dialogue as pairs of role (`user` or `model`) and stripped text.

    Args:
      messages: The messages; the user's comes first, then the roles alternate.
      merge_system: Whether to prepend a system message, with an empty line, to the first user turn; the
        format has no turn for it.

    Raises:
      UserError: There is no message, a message has no text or an unknown role, the roles do not alternate, or
        there is a system message and `merge_system` is false.
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


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, turn: bool) -> list[int]:
    """Returns the token ids of a user's turn with the model's opened after it, or of a plain text.

    Both begin with `<bos>`, and nothing in the prompt becomes a control token.
    """
    if turn:
        return encode_dialogue(tokenizer, [{"role": "user", "content": prompt}], answer=True)
    return [tokenizer.bos_id, *tokenizer.encode_typed(prompt)]


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Message], *, answer: bool, merge_system: bool = False
) -> list[int]:
    """Returns the token ids of a dialogue, `<bos>` included. No text in a message becomes a control token.

    Args:
      tokenizer: The tokenizer of the model.
      messages: The messages, as for `turns`.
      answer: Whether to open a model turn at the end, which the model then completes.
      merge_system: As for `turns`.

    Raises:
      UserError: As for `turns`; or `answer` is true but the last turn is already the model's.
    """
    spoken = turns(messages, merge_system=merge_system)
    if answer and spoken[-1][0] == "model":
        raise UserError("the dialogue ends with a turn of the model; add one of the user to be answered.")
    ids = [tokenizer.bos_id]
    for role, text in spoken:
        header, content = encode_turn(tokenizer, role, text)
        ids += header + content
    return ids + encode_turn(tokenizer, "model", "")[0] if answer else ids


def encode_turn(tokenizer: Tokenizer, role: str, text: str) -> tuple[list[int], list[int]]:
    """Returns the token ids of one turn, in two parts.

    The first part is <start_of_turn>, the role and a newline; the second is the text, <end_of_turn> and a
    newline. Nothing in the text becomes a control token.
    """
    newline = tokenizer.encode("\n")
    header = [tokenizer.start_of_turn_id, *tokenizer.encode(role), *newline]
    return header, [*tokenizer.encode_typed(text), tokenizer.end_of_turn_id, *newline]
