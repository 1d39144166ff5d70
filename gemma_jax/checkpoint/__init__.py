"""The checkpoints of runs: written while training goes on, whole or absent, checked when they are read."""
