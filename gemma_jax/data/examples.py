"""Makes examples for fine-tuning of records: token ids, each with its weight in the loss.

A record is a dialogue, a prompt with its answer, an instruction with its output, a text, or a preference
pair. Each becomes a list of turns. In the chat template these are the turns of Gemma's format (`chat.py`). In
the plain template a prompt is one turn and its answer, which ends with eos, is another. A text is a single
turn. Nothing in a record becomes a control token.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gemma_jax.config.sections import ExampleDataConfig
from gemma_jax.data.chat import SYSTEM, encode_turn, turns
from gemma_jax.data.documents import open_source
from gemma_jax.data.record_source import TokenRecords
from gemma_jax.data.source import (
    BadRecord,
    Document,
    Example,
    LongExample,
    OnSkip,
    Records,
    Shard,
    Source,
    hash_of,
    text_of,
)
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer

_FORMAT = 1  # raised whenever the same records make other ids or weights

# For each format, the fields that a record of it has: all of one of these tuples.
_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dialogue": (("messages",), ("conversations",), ("conversation",), ("data",)),
    "completion": (("prompt", "completion"),),
    "instruction": (("instruction", "output"),),
    "text": (),  # the field that data.text_field names
    "preference": (("chosen", "rejected"),),
}
_ROLES = {"human": "user", "gpt": "model"}  # of ShareGPT; others are those of chat.py


class _Turn(NamedTuple):
    ids: list[int]
    header: int
    """The number of ids at the beginning that the model does not write: all of them in a turn of the user."""
    newline: int = 0
    """The number of ids at the end that are the newline after <end_of_turn>."""

    @property
    def is_answer(self) -> bool:
        return self.header < len(self.ids)


def open_example_sources(
    data: ExampleDataConfig, tokenizer: Tokenizer, *, pairs: bool
) -> "list[ExampleSource]":
    """Opens the corpora that a config names as examples, without reading their records.

    Args:
      data: The corpora, and how records become examples.
      tokenizer: The tokenizer of the model.
      pairs: Whether the examples are preference pairs: two consecutive examples, the chosen answer first.

    Raises:
      UserError: A corpus is unknown or holds token ids, or data.format does not fit `pairs`.
    """
    if data.format not in ("auto", "preference") if pairs else data.format == "preference":
        raise UserError(
            f"data.format is {data.format}, but objective dpo trains on preference pairs, and only it does; "
            "set data.format=auto or another objective."
        )
    sources = []
    for spec in data.sources:
        records = open_source(spec, text_field=data.text_field, bad_records=data.bad_records, all_fields=True)
        if isinstance(records, TokenRecords):
            raise UserError(f"{spec} holds token ids without fields; name records of text in data.sources.")
        sources.append(ExampleSource(records, data, tokenizer, pairs))
    return sources


class ExampleSource(Source):
    """The examples in the records of a corpus.

    Examples that are longer than a row are left out, or cut: a dialogue loses its last turns, but not the
    first turn of the user and the model's answer to it; the prompt of a pair loses its oldest turns; a text
    becomes several examples. If the rest is still too long, the example is left out.

    The first turn decides whether an example is held out. So dialogues and pairs that begin with the same
    prompt are on the same side.
    """

    weighted = True

    def __init__(self, records: Records, data: ExampleDataConfig, tokenizer: Tokenizer, pairs: bool):
        self.name = records.name
        self.shards = records.shards
        self.group_size = 2 if pairs else 1
        self._records = records
        self._data = data
        self._tokenizer = tokenizer
        settings = data.format, data.template, data.train_on, data.train_newline, data.system
        limits = data.long_examples, data.sequence_length
        self.fingerprint = hash_of(
            _FORMAT, records.fingerprint, tokenizer.fingerprint, pairs, *settings, *limits
        )

    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        return self._records.convert(shard, on_skip, self._examples)

    def place(self, shard: Shard, number: int) -> str:
        return self._records.place(shard, number)

    def _examples(self, fields: dict[str, Any], number: int) -> list[Example]:
        """Returns the examples of a record. Raises BadRecord and LongExample."""
        # In Parquet and `datasets` every row has all columns.
        fields = {name: value for name, value in fields.items() if value is not None}
        try:
            kind = self._kind(fields)
            if self.group_size == 2:
                return self._pair(self._two_answers(fields), number)
            return self._single(self._turns_of(kind, fields), number)
        except UserError as error:
            raise BadRecord(str(error).rstrip(".")) from error

    def _kind(self, fields: dict[str, Any]) -> str:
        """Returns the format of a record. Raises BadRecord if it lacks the fields of the wanted format."""
        wanted = "preference" if self.group_size == 2 else self._data.format
        known = {**_FIELDS, "text": ((self._records.text_field,),)}
        if wanted == "auto":
            del known["preference"]
        for kind, choices in known.items():
            if wanted in (kind, "auto") and any(fields.keys() >= {*names} for names in choices):
                return kind
        needed = [names for kind, choices in known.items() if wanted in (kind, "auto") for names in choices]
        raise BadRecord(
            f"its fields are {', '.join(fields) or 'none'}, but an example needs "
            f"{' or '.join(' and '.join(names) for names in needed)} (data.format, data.text_field)"
        )

    def _turns_of(self, kind: str, fields: dict[str, Any]) -> list[_Turn]:
        """Returns the turns of a record that is not a pair; none if it is an empty text."""
        if kind == "dialogue":
            names = (name for (name,) in _FIELDS["dialogue"] if name in fields)
            return self._dialogue(fields[next(names)])
        if kind == "completion":
            return self._prompt_and_answer(fields["prompt"], fields["completion"])
        if kind == "instruction":
            return self._prompt_and_answer(self._instruction(fields), fields["output"])
        text = _text(fields[self._records.text_field], f"field {self._records.text_field!r}")
        return [self._plain(text, is_answer=True)] if text else []

    def _dialogue(self, messages: Any) -> list[_Turn]:
        """Returns the turns of a dialogue: dicts of role and content or from and value, or texts by turns."""
        if not isinstance(messages, list):
            raise BadRecord(f"a dialogue is not a list of messages but {type(messages).__name__}")
        read = [_message(message, number) for number, message in enumerate(messages)]
        for number, message in enumerate(read, start=1):
            if not message["content"].strip():
                raise BadRecord(f"turn {number} of the dialogue is empty")
        if self._data.system == "error" and read and read[0]["role"] == SYSTEM:
            raise BadRecord(
                "the dialogue begins with a system turn, which Gemma does not have (data.system=merge puts "
                "it in front of the first user turn)"
            )
        made = []
        for role, text in turns(read, merge_system=True):
            header, content = encode_turn(self._tokenizer, role, text)
            own = len(header) if role == "model" else len(header) + len(content)
            made.append(_Turn(header + content, own, len(self._tokenizer.encode("\n"))))
        return made

    def _prompt_and_answer(self, prompt: Any, answer: Any) -> list[_Turn]:
        """Returns the turns of a prompt and its answer; each is a text or a list of messages."""
        if self._data.template == "chat" or isinstance(prompt, list) or isinstance(answer, list):
            return self._dialogue([*_messages(prompt, "user"), *_messages(answer, "model")])
        texts = _text(prompt, "the prompt"), _text(answer, "the answer")
        if not texts[1]:
            raise BadRecord("the answer is empty")
        return [self._plain(texts[0], is_answer=False), self._plain(texts[1], is_answer=True)]

    def _plain(self, text: str, *, is_answer: bool) -> _Turn:
        ids = self._tokenizer.encode_typed(text)
        return _Turn([*ids, self._tokenizer.eos_id], 0) if is_answer else _Turn(ids, len(ids))

    def _instruction(self, fields: dict[str, Any]) -> str:
        """Returns an instruction and its input, with empty lines between them and before a plain answer."""
        texts = [_text(fields.get(name, ""), name) for name in ("instruction", "input")]
        prompt = "\n\n".join(text for text in texts if text)
        return prompt if self._data.template == "chat" else f"{prompt}\n\n"

    def _two_answers(self, fields: dict[str, Any]) -> list[list[_Turn]]:
        """Returns the turns of the chosen and of the rejected dialogue, prompts included."""
        answers = fields["chosen"], fields["rejected"]
        prompt = fields.get("prompt")
        if prompt is None and "instruction" in fields:
            prompt = self._instruction(fields)
        if any(isinstance(answer, list) for answer in answers):
            return [self._dialogue(_with_prompt(_messages(answer, "model"), prompt)) for answer in answers]
        chosen, rejected = _text(answers[0], "chosen"), _text(answers[1], "rejected")
        if prompt is None:
            length = _shared_prompt(chosen, rejected)
            prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        return [self._prompt_and_answer(prompt, answer) for answer in (chosen, rejected)]

    def _single(self, made: list[_Turn], number: int) -> list[Example]:
        """Returns the example of some turns, cut if it is too long; several examples of a long text."""
        L = self._data.sequence_length
        length = sum(len(turn.ids) for turn in made)
        if length <= L:
            return [self._example(made, made[0], number)] if made else []
        kept = made if self._data.long_examples == "cut" else []
        if len(kept) == 1 and kept[0].is_answer:
            ids = kept[0].ids
            pieces = [_Turn(ids[start : start + L], 0) for start in range(0, len(ids), L)]
            examples = [self._example([piece], made[0], number) for piece in pieces]
        else:
            while kept and (sum(len(turn.ids) for turn in kept) > L or not kept[-1].is_answer):
                kept = kept[:-1]
            if not kept:
                raise LongExample(f"{length:,} tokens, more than data.sequence_length {L:,}")
            examples = [self._example(kept, made[0], number)]
        examples[0].shortened = True
        return examples

    def _pair(self, both: list[list[_Turn]], number: int) -> list[Example]:
        """Returns the examples of the chosen and the rejected answer, whose prompts are cut identically."""
        if both[0] == both[1]:
            raise BadRecord("chosen and rejected are equal, so there is nothing to prefer")
        shared = 0  # turns that both begin with: the prompt
        while shared < min(map(len, both)) and both[0][shared] == both[1][shared]:
            shared += 1
        if not all(len(one) > shared and one[shared].is_answer for one in both):
            raise BadRecord("chosen and rejected are not two answers to the same prompt")
        cut = 0
        length = sum(len(turn.ids) for one in both for turn in one)
        while sum(len(turn.ids) for one in both for turn in one[cut:]) > self._data.sequence_length:
            cut += 2  # a turn of the user and the model's answer to it
            if self._data.long_examples == "drop" or cut >= shared:
                limit = f"data.sequence_length {self._data.sequence_length:,}"
                raise LongExample(f"a pair of together {length:,} tokens, more than {limit}")
        examples = [self._example(one[cut:], one[0], number, shared - cut) for one in both]
        examples[0].shortened = cut > 0
        return examples

    def _example(self, made: Sequence[_Turn], first: _Turn, number: int, prompt: int = 0) -> Example:
        """Returns the example of some turns, of which the first `prompt` are not trained; in pairs only."""
        everything = self._data.train_on == "everything" and self.group_size == 1
        trained = [i for i, turn in enumerate(made) if turn.is_answer and i >= prompt]
        if self._data.train_on == "last_answer":
            trained = trained[-1:]
        weights: list[float] = []
        for i, turn in enumerate(made):
            header = 0 if everything else turn.header if i in trained else len(turn.ids)
            newline = turn.newline if self._data.train_newline == "off" else 0
            weights += [float(header <= k < len(turn.ids) - newline) for k in range(len(turn.ids))]
        ids = [token for turn in made for token in turn.ids]
        return Example(ids, weights, number, repr(first.ids).encode() if first.ids else b"")


def _text(value: Any, name: str) -> str:
    return text_of(value, name, 0).text


def _message(value: Any, number: int) -> dict[str, str]:
    """Returns a message as role and content. A mere text is a turn of the user or, by turns, of the model."""
    name = f"turn {number + 1} of the dialogue"
    if isinstance(value, str | bytes):
        return {"role": ("user", "model")[number % 2], "content": _text(value, name)}
    if not isinstance(value, Mapping):
        raise BadRecord(f"{name} is not a message but {type(value).__name__}")
    role, content = (value.get(a, value.get(b)) for a, b in (("role", "from"), ("content", "value")))
    role = _text(role, f"the role of {name}")
    return {"role": _ROLES.get(role, role), "content": _text(content, f"the content of {name}")}


def _messages(value: Any, role: str) -> list[Any]:
    """Returns a list of messages unchanged, and a text as a message of `role`."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _with_prompt(messages: list[Any], prompt: Any) -> list[Any]:
    """Returns messages that begin with their prompt, which is put in front of an answer alone."""
    if prompt is None or not messages or _message(messages[0], 0)["role"] in ("user", SYSTEM):
        return messages
    return [*_messages(prompt, "user"), *messages]


def _shared_prompt(chosen: str, rejected: str) -> int:
    """Returns the length of the prompt that two texts begin with.

    It ends where the texts differ, or before the word in which they do: before the last space or after the
    last newline. Neither text is empty without it.
    """
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
    return max(chosen.rfind("\n", 0, same) + 1, chosen.rfind(" ", 0, same), 0)
