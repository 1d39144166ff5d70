"""Train a Gemma: python train.py pretrain|finetune CONFIG [--FIELD VALUE ...]."""

import sys

from gemma_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python train.py", commands=["pretrain", "finetune"]))
