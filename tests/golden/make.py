"""What transformers computes with small random Gemmas: the golden files, and the live comparison.

    python tests/golden/make.py     # writes the .npz files beside this one; needs transformers and torch

A golden file holds results only. The weights come from a numpy seed (`random_tensors` in
tests/pretrained/published.py), here and in the tests that read the file.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from tests.pretrained import published  # noqa: E402  # found only now

# As small as they can be, so that every gradient fits into a file of tens of KB. sqrt(24) is not a bfloat16
# number, and 24 / 4 (width by heads) is not the head dim.
MULTI_QUERY = published.MULTI_QUERY | {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "head_dim": 8,
    "max_position_embeddings": 8192,
}
# Like the 7B: a key head for every query head, and heads * head_dim is not the width.
MULTI_HEAD = MULTI_QUERY | {"num_key_value_heads": 4}
CASES = {"multi_query": MULTI_QUERY, "multi_head": MULTI_HEAD}

BATCH, LENGTH = 2, 10
FAR = 8000  # a position that bfloat16 cannot tell from its neighbours
NEW = 10
PROMPTS = [[2, 30, 31, 32, 33, 34, 35], [2, 50, 51], [2, 20, 21, 22, 23]]
ADAMW = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
STEPS = 5


def tensors(case: str, dtype: str = "float32") -> published.Tensors:
    """The weights of a case by their Hugging Face names.

    Twice as wide as they are usually: a wrong activation function then shows in the logits.
    """
    values = published.random_tensors(CASES[case], "float32", seed=list(CASES).index(case))
    return {name: (2 * x).astype(published.TYPES[dtype][1]) for name, x in values.items()}


def tokens(vocab_size: int) -> np.ndarray:
    """[BATCH, LENGTH + 1] int64: rows that begin with <bos>; the last column is only a target."""
    ids = np.random.default_rng(1).integers(4, vocab_size, (BATCH, LENGTH + 1))
    ids[:, 0] = 2
    return ids


def make_model(config: dict[str, Any], weights: published.Tensors) -> Any:
    """GemmaForCausalLM with these weights, in float32."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    model = GemmaForCausalLM(GemmaConfig(**config, attn_implementation="eager")).eval()
    state = {name: torch.from_numpy(x.astype(np.float32)) for name, x in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def hidden_states(model: Any, ids: Any, position: int = 0) -> dict[str, np.ndarray]:
    """Embeddings, the output of each layer, of the first norm and of the last, and logits."""
    import torch

    seen: dict[str, torch.Tensor] = {}
    inner = model.model
    places = {"embeddings": inner.embed_tokens, "first_norm": inner.layers[0].input_layernorm}
    places |= {f"layer_{i}": layer for i, layer in enumerate(inner.layers)} | {"final_norm": inner.norm}

    def remember(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in places.items()]
    with torch.no_grad():
        positions = position + torch.arange(ids.shape[1])[None].expand(ids.shape)
        seen["logits"] = model(ids, position_ids=positions, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return {name: x.float().numpy() for name, x in seen.items()}


def greedy(model: Any, prompts: list[list[int]]) -> np.ndarray:
    """[prompts, NEW] continuations of a left-padded batch; <pad> after an end."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=1, pad_token_id=0
    )[:, longest:].numpy()
    return np.pad(out, [(0, 0), (0, NEW - out.shape[1])])


def training(model: Any, ids: Any) -> dict[str, np.ndarray]:
    """Mean cross entropy and its gradients, then the losses of AdamW steps on the same batch."""
    import torch

    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    scales = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": ADAMW["weight_decay"]}, {"params": scales, "weight_decay": 0.0}],
        lr=ADAMW["learning_rate"],
        betas=(ADAMW["b1"], ADAMW["b2"]),
        eps=ADAMW["epsilon"],
    )
    losses, found = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            found = {f"gradient/{name}": p.grad.numpy().copy() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["clip_norm"])
        optimizer.step()
    return {"losses": np.array(losses), **found}


def reference(config: dict[str, Any], weights: published.Tensors) -> dict[str, np.ndarray]:
    """Everything that our results are compared with, of a model with these weights in float32."""
    import torch

    torch.manual_seed(0)
    model = make_model(config, weights)
    ids = torch.from_numpy(tokens(config["vocab_size"]))
    found = hidden_states(model, ids[:, :-1])
    found["far_logits"] = hidden_states(model, ids[:, :-1], FAR)["logits"]
    found["greedy"] = greedy(model, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert (greedy(model, [prompt])[0] == found["greedy"][row]).all(), "the reference contradicts itself"
    rounded = {name: x.astype(published.TYPES["bfloat16"][1]) for name, x in weights.items()}
    exact = hidden_states(make_model(config, rounded), ids[:, :-1], FAR)
    coarse = hidden_states(make_model(config, rounded).bfloat16(), ids[:, :-1], FAR)
    found["rounded_logits"] = exact["logits"]
    for name in ("embeddings", "first_norm", "logits"):
        found[f"bfloat16_{name}"] = coarse[name]
    return found | training(model, ids)


if __name__ == "__main__":
    for case, config in CASES.items():
        np.savez_compressed(FOLDER / f"{case}.npz", **reference(config, tensors(case)))
        print(f"{case}.npz: {(FOLDER / f'{case}.npz').stat().st_size:,} bytes")
