"""Sample from a Gemma: python sample.py CHECKPOINT --prompt TEXT [--FIELD VALUE ...]."""

import sys

from gemma_jax.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("sample", sys.argv[1:], prog="python sample.py"))
