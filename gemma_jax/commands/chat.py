"""`gemma chat CHECKPOINT`: holds a dialogue in the terminal, or answers the lines of a pipe."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_jax.commands.sample import load_gemma
from gemma_jax.config import ChatConfig, read_command, suggestion, validate_chat
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from gemma_jax.sampling import Chat

HELP = {
    "/reset": "start a new dialogue",
    "/save FILE": "write the dialogue to a new file, as a line of JSON",
    "/help": "this list",
}


def run(arguments: Sequence[str], prog: str) -> int:
    """Answer each line. In a terminal the dialogue continues after an error; in a pipe the error ends it."""
    (checkpoint,), config = read_command(arguments, prog, "CHECKPOINT", ChatConfig(), validate=validate_chat)

    gemma = load_gemma(checkpoint, config)
    conversation = Conversation(gemma.chat(system=config.system, config=config))
    if not sys.stdin.isatty():
        for line in sys.stdin:
            conversation.take(line)
        return 0
    _tell(f"{checkpoint} listens. /help lists what it does besides; Ctrl-C stops an answer, Ctrl-D ends.")
    for line in _typed_lines():
        try:
            conversation.take(line)
        except UserError as error:
            _tell(f"error: {error}")
        except KeyboardInterrupt:
            print(flush=True)
            _tell("[stopped]")
    return 0


class Conversation:
    """Prints a chat on standard output, and runs the commands that a line may hold instead of a message."""

    def __init__(self, chat: "Chat") -> None:
        self.chat = chat
        self._saved: set[Path] = set()

    def take(self, line: str) -> None:
        """Answer a line, or run the command in it.

        Raises:
          UserError: There is no such command, the file to save to exists already or cannot be written, or the
            dialogue fills the context.
        """
        line = line.strip("\r\n")
        name, _, argument = line.partition(" ")
        if not line.strip():
            return
        # A line that begins with /usr/bin is a message; /rest is a mistyped command.
        if not name.startswith("/") or not name[1:].isalpha():
            self._answer(line)
        elif name == "/reset":
            self.chat.reset()
            _tell("[the dialogue begins anew]")
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/help":
            _tell("\n".join(f"{command:12} {meaning}" for command, meaning in HELP.items()))
        else:
            known = [command.split()[0] for command in HELP]
            raise UserError(
                f"there is no command {name}{suggestion(name, known)} "
                "(a message that begins with a slash needs a space in front)."
            )

    def _answer(self, message: str) -> None:
        for piece in self.chat.stream(message):
            print(piece, end="", flush=True)
        print(flush=True)
        if self.chat.finish_reason == "context":
            _tell("[cut off: the model's context is full; /reset begins anew]")
        elif self.chat.finish_reason == "length":
            _tell("[cut off after max_new_tokens]")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file, as in /save dialogue.jsonl.")
        path = Path(name).expanduser().absolute()
        text = json.dumps({"messages": self.chat.history}, ensure_ascii=False) + "\n"
        try:
            # Overwrite a file only if this dialogue has written it before.
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise UserError(f"{name} is there already; name a file that is not.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be written: {error}.") from error
        self._saved.add(path)
        _tell(f"[{len(self.chat.history)} messages are in {name}]")


def _typed_lines() -> Iterator[str]:
    """Yields the lines typed at a prompt. Ctrl-C at the prompt discards the line."""
    with contextlib.suppress(ImportError):  # Python may be built without it
        import readline  # noqa: F401  # input() then supports the arrow keys
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _tell("[Ctrl-D ends]")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
