"""Gemma in JAX: pretrain, fine-tune, sample, evaluate and serve."""
