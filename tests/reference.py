"""Gemma in plain numpy and float64, written from the model's published description.

Slow and obvious on purpose: one row, one head, one position at a time where that reads better. It
shares no code with the package. Parameters come by the package's names, stacked over layers.
"""

import math

import numpy as np


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """One head vector: dimension i turns together with dimension i + H/2, as one complex number."""
    half = x.shape[-1] // 2
    angle = position / base ** (np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def hidden_states(params: dict[str, np.ndarray], tokens: list[int], base: float = 10_000.0) -> np.ndarray:
    """[L, D] after the final norm, for one sequence with positions from 0."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    layers, _, heads, head_dim = p["blocks.attention.q"].shape
    group = heads // p["blocks.attention.k"].shape[2]
    x = p["embedding"][tokens] * math.sqrt(p["embedding"].shape[1])
    for layer in range(layers):
        weight = {
            name.removeprefix("blocks."): v[layer] for name, v in p.items() if name.startswith("blocks.")
        }
        y = norm(x, weight["attention_norm"])
        out = np.zeros_like(x)
        for head in range(heads):
            kv = head // group
            q = np.stack([rotate(v, i, base) for i, v in enumerate(y @ weight["attention.q"][:, head])])
            k = np.stack([rotate(v, i, base) for i, v in enumerate(y @ weight["attention.k"][:, kv])])
            v = y @ weight["attention.v"][:, kv]
            for i in range(len(tokens)):
                scores = k[: i + 1] @ q[i] / math.sqrt(head_dim)
                shares = np.exp(scores - scores.max())
                out[i] += (shares / shares.sum()) @ v[: i + 1] @ weight["attention.o"][head]
        x = x + out
        y = norm(x, weight["feed_forward_norm"])
        gated = tanh_gelu(y @ weight["feed_forward.gate"]) * (y @ weight["feed_forward.up"])
        x = x + gated @ weight["feed_forward.down"]
    return norm(x, p["final_norm"])


def logits(params: dict[str, np.ndarray], tokens: list[int], base: float = 10_000.0) -> np.ndarray:
    """[L, V] of one sequence."""
    return hidden_states(params, tokens, base) @ np.asarray(params["embedding"], np.float64).T
