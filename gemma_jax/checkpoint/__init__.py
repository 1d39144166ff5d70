"""Checkpoints of runs: written while training continues, never visible half-written, verified when read."""
