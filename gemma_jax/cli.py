"""The `gemma` command."""

import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence

from gemma_jax.config import suggestion
from gemma_jax.errors import UserError

COMMANDS = {
    "pretrain": "train a model from random weights: gemma pretrain CONFIG [--FIELD VALUE ...]",
    "sample": "continue prompts: gemma sample CHECKPOINT --prompt TEXT [--FIELD VALUE ...]",
    "chat": "talk with an instruction-tuned model: gemma chat CHECKPOINT [--FIELD VALUE ...]",
    "convert": "weights into another form: gemma convert SOURCE DESTINATION --format huggingface|flax|run",
    "verify": "what is in a checkpoint, and a verdict: gemma verify CHECKPOINT [--against DIRECTORY]",
    "replay": "the batch of a step with the loss of each token: gemma replay RUN STEP [--rows N] [--json]",
    "runs": "a table of the runs under a directory: gemma runs DIR [--plot FILE.png]",
    "plan": "memory, traffic and time on TPUs that are not here: gemma plan CONFIG --topology v5e-256",
    "inspect": "each parameter's shape and place on the mesh: gemma inspect CONFIG_OR_CHECKPOINT",
}


def main(arguments: Sequence[str] | None = None, prog: str = "gemma", commands: Sequence[str] = ()) -> int:
    """Run a command and give its exit status: 2 after a mistake of the user, which is told in a sentence.

    Args:
      arguments: the command and its own arguments; those of the process if left out.
      prog: what the program is called in messages.
      commands: those that this program has; all if left out.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    known = {name: COMMANDS[name] for name in commands or COMMANDS}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND ...  ({prog} COMMAND --help tells more)\n")
        for name, meaning in known.items():
            print(f"  {name:10} {meaning}")
        return 0
    name, *rest = arguments
    if name not in known:
        return _tell(f"{prog} has no command {name!r}{suggestion(name, known)}; see `{prog} --help`.")
    return run_command(name, rest, f"{prog} {name}")


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Run one command and give its exit status.

    130 after Ctrl-C, where the command has no way of its own; 141 when nobody reads on, as in `| head`.

    Args:
      name: of the command.
      arguments: its own.
      prog: what it is called in messages.
    """
    try:
        # A command imports what it needs only after its config has been read: mistakes are told at once.
        status: int = importlib.import_module(f"gemma_jax.commands.{name}").run(arguments, prog)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python would write what is left of the output when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except UserError as error:
        return _tell(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _nobody_reads() -> bool:
    """Whether the reader of the standard output is gone, which a pipe tells as an error."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _tell(mistake: str) -> int:
    # One line, whatever a file name or another library's message brought into it.
    print("error:", " ".join(mistake.splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
