"""The `gemma` command."""

# Few modules are imported here, because Ctrl-C during an import at the top of this file prints a traceback.
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from gemma_jax.errors import UserError
from gemma_jax.streams import OutputLost, guard_streams

COMMANDS = {
    "pretrain": ("train a model from random weights", "CONFIG [--FIELD VALUE ...]"),
    "finetune": ("train a model further", "CONFIG --init_from CHECKPOINT [--FIELD VALUE ...]"),
    "data-preview": ("the first examples to fine-tune on", "CONFIG [--examples N] [--FIELD VALUE ...]"),
    "sample": ("continue prompts", "CHECKPOINT --prompt TEXT [--FIELD VALUE ...]"),
    "chat": ("talk with an instruction-tuned model", "CHECKPOINT [--FIELD VALUE ...]"),
    "convert": ("weights into another form", "SOURCE DESTINATION --format huggingface|flax|run|gguf|peft"),
    "verify": ("what is in a checkpoint, and a verdict", "CHECKPOINT [--against DIRECTORY]"),
    "replay": ("the batch of a step with the loss of each token", "RUN STEP [--rows N] [--json]"),
    "runs": ("a table of the runs under a directory", "DIRECTORY [--plot FILE.png]"),
    "plan": ("memory, traffic and time on TPUs that are not here", "CONFIG --topology v5e-256"),
    "inspect": ("each parameter's shape and place on the mesh", "CONFIG_OR_CHECKPOINT"),
}

BUCKET_LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs")


def main(arguments: Sequence[str] | None = None, prog: str = "gemma", commands: Sequence[str] = ()) -> int:
    """Runs a command and returns its exit status: 2 after a mistake of the user, reported in one sentence.

    Args:
      arguments: The command and its own arguments; by default those of the process.
      prog: The name of the program in messages.
      commands: The commands that this program has; by default all.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    known = commands or list(COMMANDS)
    if not arguments or arguments[0] in ("-h", "--help"):
        return _status(lambda: print(_usage(prog, known)))
    name, *rest = arguments
    if name == "--version":
        return _status(lambda: print(_version()))
    if name not in known:
        return _status(lambda: _refuse(name, prog, known))
    return run_command(name, rest, f"{prog} {name}")


def _refuse(name: str, prog: str, known: Sequence[str]) -> NoReturn:
    from gemma_jax.config import suggestion

    raise UserError(f"{prog} has no command {name!r}{suggestion(name, known) or '.'} See `{prog} --help`.")


def _usage(prog: str, commands: Sequence[str]) -> str:
    lines = [f"usage: {prog} COMMAND ... (`{prog} COMMAND --help` lists its options) or {prog} --version\n"]
    for name in commands:
        meaning, usage = COMMANDS[name]
        lines.append(f"  {name:12} {meaning}: {prog} {name} {usage}")
    return "\n".join(lines)


def _version() -> str:
    """Returns the versions of this package and of jax, its devices, and what CPUs sample with."""
    from collections import Counter

    import jax

    from gemma_jax import __version__
    from gemma_jax.weights import native

    try:
        kinds = Counter(device.device_kind for device in jax.devices())
        devices = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    except RuntimeError as error:  # for example JAX_PLATFORMS=tpu without a TPU
        devices = f"none ({' '.join(str(error).split())})"
    lines = [f"gemma_jax {__version__}", f"jax {jax.__version__}", f"devices: {devices}"]
    return "\n".join([*lines, f"sampling on CPU: {native.kernels()}"])


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Runs one command and returns its exit status.

    Args:
      name: The name of the command.
      arguments: The command's own arguments.
      prog: The name of the program in messages.
    """
    # This package relies on jax's default type and rank promotion, so it ignores these variables, which are
    # set for other programs.
    for variable in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
        os.environ.pop(variable, None)
    # A command imports what it needs only after it has read its config, so mistakes are reported at once.
    module = f"gemma_jax.commands.{name.replace('-', '_')}"
    return _status(lambda: importlib.import_module(module).run(arguments, prog))


def _status(work: Callable[[], int | None]) -> int:
    """Runs `work` and returns the exit status.

    The status is that of `work`, or 0 if it has none; 2 after a mistake of the user; 130 after Ctrl-C; 141 if
    the reader of its output has closed the pipe, as in `| head`.
    """
    guard_streams()
    try:
        try:
            status = work() or 0
        except SystemExit as end:  # after --help
            status = int(end.code or 0)
        except UserError as error:
            status = _report(str(error))
        except Exception as error:
            # Whatever the libraries of buckets raise is about the address, the network or the access.
            if type(error).__module__.partition(".")[0] not in BUCKET_LIBRARIES:
                raise
            status = _report(
                f"the bucket fails ({str(error)[:200]}); check its address, your access, the network."
            )
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        sys.stdout.flush()
        return status
    except OutputLost as lost:
        if isinstance(lost.__cause__, BrokenPipeError):
            return 128 + signal.SIGPIPE
        return _report(f"standard output cannot be written ({lost.__cause__}); send it to another place.")


def _report(mistake: str) -> int:
    # Always one line, even if a file name or another library's message contains line breaks.
    print("error:", " ".join(mistake.splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
