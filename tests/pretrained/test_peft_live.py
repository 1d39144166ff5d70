"""Adapters beside PEFT itself (`make parity`): outputs, loss and gradients, in both directions."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained import peft
from gemma_jax.pretrained.adapters import stacked
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.pretrained.peft import read_peft, write_peft
from gemma_jax.sharding import named_arrays, with_arrays
from gemma_jax.testing import relative_difference
from gemma_jax.training.loss import LossSettings, next_token_loss
from gemma_jax.weights import EMBEDDING, Adapters
from tests.pretrained.published import (
    MULTI_QUERY,
)
from tests.pretrained.test_peft import ALL, LIVE, PREFIX, TOKENS, adapted


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma that transformers has made and saved."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {name: value for name, value in MULTI_QUERY.items() if name not in ("model_type", "rope_theta")}
    folder = tmp_path_factory.mktemp("there")
    GemmaForCausalLM(GemmaConfig(**sizes)).save_pretrained(folder)
    return folder


LIVE_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": [*ALL]},
    "defaults": {},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "target_modules": r".*\.(q|o|down)_proj", "exclude_modules": r".*1\.mlp.*",
        "rank_pattern": {"^model.layers.1.self_attn.*": 3, "o_proj": 2},  # PEFT sorts them when it saves
        "alpha_pattern": {"1.self_attn.q_proj": 5},
    },
    "layers": {
        "target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
    },
    "rows": {"target_modules": ["v_proj"], "trainable_token_indices": [40, 7, 8]},
    "named rows": {"target_modules": ["k_proj"], "trainable_token_indices": {"embed_tokens": [9, 5]}},
}  # fmt: skip


def gemma_of(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def tokens_of(settings: dict[str, Any]) -> np.ndarray:
    """Rows that hold the tokens whose embeddings are trained."""
    ids = settings.get("trainable_token_indices") or []
    ids = ids["embed_tokens"] if isinstance(ids, dict) else ids
    rows = TOKENS.copy()
    rows[0, : len(ids)] = ids
    return rows


@LIVE
@pytest.mark.parametrize("case", LIVE_CONFIGS)
def test_peft_computes_the_same(tmp_path: Path, there: Path, case: str) -> None:
    """Logits, loss and gradients of an adapter of PEFT, and the logits of the same adapter written by us."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    settings, rows = LIVE_CONFIGS[case], tokens_of(LIVE_CONFIGS[case])
    inputs = torch.from_numpy(rows)
    plain = gemma_of(there)
    unadapted = plain(inputs).logits.detach().numpy()
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    for x in trained.values():
        x.data = torch.randn(x.shape, generator=generator) / 5
    out = model(inputs, labels=inputs)
    out.loss.backward()
    logits, loss = out.logits.detach().numpy(), out.loss.item()
    assert relative_difference(logits, unadapted) > 0.01
    model.save_pretrained(tmp_path / "theirs")

    config = open_checkpoint(there).config
    adapter = read_peft(tmp_path / "theirs", config)
    assert adapter.base == str(there)
    spec, params = adapted(there, adapter)
    assert relative_difference(Gemma(spec, params, None, adapters=[""]).logits(rows), logits) < 1e-4
    found, gradients = loss_and_gradients(spec, params, rows)
    assert found == pytest.approx(loss, rel=1e-4)
    _, _, _, arrays = stacked([adapter], config)
    assert {name for name in gradients if name.endswith((".a", ".b"))} == arrays.keys()
    for (parameter, layer), pair in adapter.pairs.items():
        name = peft.tensor_name(parameter, layer).removesuffix(".weight")
        a, b = (trained[f"{PREFIX}{name}.lora_{x}.default.weight"].grad.numpy() for x in "AB")
        d_a = gradients[f"{parameter}.a"][layer, 0, ..., : pair.rank]
        d_b = gradients[f"{parameter}.b"][layer, 0, : pair.rank] * pair.scale  # the scale is in our b
        assert relative_difference(np.reshape(d_a, (-1, pair.rank)), a.T) < 1e-4
        assert relative_difference(np.reshape(d_b, (pair.rank, -1)), b.T) < 1e-4
    if adapter.rows:
        (delta,) = (x.grad.numpy() for name, x in trained.items() if "trainable_tokens_delta" in name)
        assert isinstance(spec.kind, Adapters)
        places = [spec.kind.rows.index(token) for token in adapter.rows]
        assert relative_difference(gradients[f"{EMBEDDING}.rows"][0, places], delta) < 1e-4

    (tmp_path / "ours").mkdir()
    write_peft(tmp_path / "ours", adapter, config)
    again = PeftModel.from_pretrained(gemma_of(there), tmp_path / "ours")
    assert relative_difference(again(inputs).logits.detach().numpy(), logits) < 1e-5


def loss_and_gradients(spec: ModelSpec, params: Any, rows: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss of predicting each row, and its gradients."""
    x, y = rows[:, :-1], rows[:, 1:]
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape)
    ones = np.ones(x.shape, np.float32)

    def loss(arrays: dict[str, jax.Array]) -> jax.Array:
        model = spec.merge(with_arrays(spec.params, arrays))
        hidden = model(x, positions, np.ones(x.shape, np.int32))
        settings = LossSettings(spec.config.vocab_size, 256, 0, 0.0)
        return next_token_loss(hidden, model.embedding, y, ones, settings)[0] / x.size

    value, gradients = jax.jit(jax.value_and_grad(loss))(named_arrays(params))
    return float(value), {name: np.asarray(x) for name, x in gradients.items()}
