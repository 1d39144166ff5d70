"""Sample from a Gemma: python sample.py CHECKPOINT --prompt TEXT [--FIELD VALUE ...]."""

import sys

from gemma_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]], prog="python sample.py", commands=["sample"]))
