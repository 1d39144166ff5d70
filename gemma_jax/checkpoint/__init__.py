"""The checkpoints of runs: written while training continues, whole or absent, checked when they are read."""
