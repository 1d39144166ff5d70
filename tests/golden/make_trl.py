"""What TRL computes for adapters of a small random Gemma: a golden file, and the live comparison.

    python tests/golden/make_trl.py     # writes trl.npz beside this file; needs trl and peft

As in make.py, the weights come from numpy seeds and the file holds results only.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from tests.golden import make  # noqa: E402  # found only now
from tests.pretrained.published import Tensors  # noqa: E402

RANK, ALPHA = 2, 6
PAD, EOS, BOS = 0, 1, 2
# Prompt, chosen and rejected answer.
PAIRS = [
    ([BOS, 10, 11, 12], [20, 21, 22, 23, 24, EOS], [30, 31, EOS]),
    ([BOS, 40, 41, 42, 43, 44, 45], [50, EOS], [60, 61, 62, 63, EOS]),
]
# Objective, beta, label smoothing, and whether the reference has an adapter of its own.
CASES: dict[str, tuple[str, float, float, bool]] = {
    "dpo": ("dpo", 0.1, 0.0, True),
    "dpo of a new adapter": ("dpo", 0.3, 0.0, False),
    "smoothed": ("dpo", 0.1, 0.1, True),
    "smoothed dpo of a new adapter": ("dpo", 0.3, 0.1, False),
    "sft": ("sft", 0.0, 0.0, False),
}


def adapter(weights: Tensors, seed: int) -> Tensors:
    """Random A and B for all linear layers, by their names in PEFT without its prefix."""
    rng, made = np.random.default_rng(seed), {}
    for name, x in weights.items():
        if name.endswith("_proj.weight"):
            outputs, inputs = x.shape
            module = name.removesuffix(".weight")
            made[f"{module}.lora_A"] = (rng.normal(size=(RANK, inputs)) / 5).astype(np.float32)
            made[f"{module}.lora_B"] = (rng.normal(size=(outputs, RANK)) / 5).astype(np.float32)
    return made


def adapters(weights: Tensors, case: str) -> tuple[Tensors, Tensors]:
    """The adapter that is trained and the reference's, which adds nothing if the adapter is a new one."""
    reference = adapter(weights, 1)
    if not CASES[case][3]:
        reference = {name: x * name.endswith("A") for name, x in reference.items()}
    return adapter(weights, 2), reference


def word(i: int) -> str:
    return f"t{i:02}"  # of two digits: special tokens are found inside longer words, too


def words(ids: list[int]) -> str:
    return "".join(f" {word(i)}" for i in ids)


def tokenizer(size: int) -> Any:
    """A tokenizer whose words are t00, t01 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word(i): i for i in range(size)}, unk_token=word(3)))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=word(PAD), eos_token=word(EOS), bos_token=word(BOS)
    )


def trainer(sizes: dict[str, Any], weights: Tensors, case: str, folder: str) -> Any:
    """TRL's trainer at the start of a run, with the adapter of the reference."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    objective, beta, smoothing, trained_before = CASES[case]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = make.make_model(sizes, weights)
    options: dict[str, Any] = {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "per_device_train_batch_size": 2,
    }  # fmt: skip
    given: dict[str, Any] = {"processing_class": tokenizer(sizes["vocab_size"]), "peft_config": lora}
    if objective == "sft":
        rows = [{"prompt": words(prompt), "completion": words(chosen)} for prompt, chosen, _ in PAIRS]
        return SFTTrainer(model, args=SFTConfig(**options), train_dataset=Dataset.from_list(rows), **given)
    if trained_before:  # then TRL keeps a copy of the adapter
        model, given["peft_config"] = get_peft_model(model, lora), None
        load(model, adapters(weights, case)[1])
    if smoothing:
        # TRL's loss "sigmoid" has no label smoothing any more. Of a single pair, "aot" is that loss with it.
        options |= {"loss_type": ["aot"], "per_device_train_batch_size": 1}
    config = DPOConfig(beta=beta, label_smoothing=smoothing, **options)
    keys = ("prompt", "chosen", "rejected")
    rows = [dict(zip(keys, map(words, pair), strict=True)) for pair in PAIRS]
    return DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), **given)


def parameters(model: Any) -> dict[str, Any]:
    """The trained matrices by the names of `adapter`."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): x
        for name, x in model.named_parameters()
        if name.endswith(".default.weight")
    }


def load(model: Any, values: Tensors) -> None:
    import torch

    found = parameters(model)
    assert found.keys() == values.keys()
    for name, x in found.items():
        x.data = torch.from_numpy(values[name].copy())


def computed(sizes: dict[str, Any], weights: Tensors, case: str) -> dict[str, np.ndarray]:
    """The means that TRL reports, the loss among them, and gradients by the names of `adapter`."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = trainer(sizes, weights, case, folder)
        model = theirs.model
        load(model, adapters(weights, case)[0])
        model.train()
        batches = list(theirs.get_train_dataloader())
        loss = sum(theirs.compute_loss(model, batch) for batch in batches) / len(batches)
    loss.backward()
    means = {
        name: np.mean(x)
        for name, x in theirs._metrics["train"].items()
        if name.startswith(("rewards/", "logps/"))
    }
    gradients = {f"gradient/{name}": x.grad.numpy() for name, x in parameters(model).items()}
    return {"loss": np.array(loss.item()), **means, **gradients}


def golden() -> dict[str, np.ndarray]:
    """Everything in the golden file, by case."""
    sizes, weights = make.CASES["multi_query"], make.tensors("multi_query")
    return {
        f"{case}/{name}": x.astype(np.float32)
        for case in CASES
        for name, x in computed(sizes, weights, case).items()
    }


if __name__ == "__main__":
    np.savez_compressed(FOLDER / "trl.npz", **golden())
    print(f"trl.npz: {(FOLDER / 'trl.npz').stat().st_size:,} bytes")
