"""`gemma verify CHECKPOINT [--against DIRECTORY]`: reports on a checkpoint and whether to trust it."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gemma_jax.config import PRESETS, TransformerConfig, VerifyConfig, read_command, replace, validate_verify
from gemma_jax.errors import UserError
from gemma_jax.paths import LARGE_FILE, read_text

if TYPE_CHECKING:
    from gemma_jax.model import ModelSpec
    from gemma_jax.pretrained.checkpoint import Checkpoint
    from gemma_jax.pretrained.layout import Weights
    from gemma_jax.verification import Statistics

# The largest relative L2 difference to transformers that rounding can explain, by dtype of the activations.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
SHOWN = 20  # number of differing arrays that are printed


class Report:
    """Prints lines and tables on standard output, and collects the faults of the checkpoint."""

    def __init__(self) -> None:
        from gemma_jax.commands.tables import report_console

        self._console = report_console()
        self.faults: list[str] = []

    def line(self, title: str, text: str) -> None:
        self._console.print(f"{title:14} {text}", markup=False, soft_wrap=True)

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        from gemma_jax.commands.tables import table

        shown = table(titles, right=titles[1:])
        for row in rows:
            shown.add_row(*row)
        self._console.print()
        self._console.print(shown, markup=False)
        self._console.print()

    def verdict(self, checked: Sequence[str]) -> int:
        """Print the verdict and return the exit status: 1 if there is a fault, otherwise 0."""
        for fault in self.faults:
            self.line("fault", fault)
        text = "not to be trusted" if self.faults else f"sound, as far as this looked: {', '.join(checked)}"
        self.line("verdict", text)
        return 1 if self.faults else 0


def run(arguments: Sequence[str], prog: str) -> int:
    """Print the report. Returns status 0 if no fault was found in the checkpoint, otherwise 1."""
    (name,), config = read_command(arguments, prog, "CHECKPOINT", VerifyConfig(), validate=validate_verify)

    from gemma_jax.pretrained.checkpoint import open_checkpoint

    report, checked = Report(), ["shapes and dtypes", "finite numbers"]
    try:
        found = open_checkpoint(name)
    except UserError as error:
        if not os.path.exists(os.path.expanduser(name)):
            raise  # there is no checkpoint to judge
        report.faults.append(str(error))
        return report.verdict(checked)
    other = open_checkpoint(config.against) if config.against else found if config.quantization else None
    if found.adapter or (other and other.adapter):
        raise UserError(
            f"{name} or {config.against} is an adapter; verify what `gemma convert --merge` makes of it."
        )
    found.kind(config.quantization)  # refuses what is quantised already
    text = read_text(os.path.expanduser(config.text), LARGE_FILE) if config.text else config.prompt
    _show_shape(report, name, found)
    # Any error in the files on disk is a fault of the checkpoint, not a mistake of the user.
    try:
        weights = _weights(found, config)
        _show_statistics(report, weights, found.config)
        if other is not None and _same_shape(report, found, other):
            if config.quantization or found.quantization:
                _show_quantised(report, found, other, config, text)
                checked.append("outputs beside the original")
            else:
                _show_differences(report, found, other, config)
                checked.append(f"equality with {config.against}")
        if not report.faults and _compared(report, found, config):
            checked.append("outputs of transformers")
    except UserError as error:
        report.faults.append(str(error))
    return report.verdict(checked)


def _weights(found: "Checkpoint", config: VerifyConfig) -> "Weights":
    """Returns the weights as they are on disk. The weights of a run are loaded onto the mesh."""
    if found.weights is not None:
        return found.weights
    from gemma_jax.pretrained.export import PlacedWeights

    spec = _spec(found, config, found.dtype)
    return PlacedWeights(found.params(spec), spec)


def _spec(found: "Checkpoint", config: VerifyConfig, dtype: str, quantization: str = "") -> "ModelSpec":
    from gemma_jax.model import ModelSpec
    from gemma_jax.sharding import make_mesh

    compute = replace(config.compute, {"param_dtype": dtype})
    return ModelSpec(found.config, compute, make_mesh(config.mesh), found.kind(quantization))


def _same_shape(report: Report, found: "Checkpoint", other: "Checkpoint") -> bool:
    ours, theirs = (dataclasses.asdict(replace(c.config, {"vocab_multiple": 1})) for c in (found, other))
    unlike = [f"{field} {ours[field]} and {theirs[field]}" for field in ours if ours[field] != theirs[field]]
    if unlike:
        report.faults.append(f"{other.name} is of another shape: {', '.join(unlike)}")
    return not unlike


def _show_shape(report: Report, name: str, found: "Checkpoint") -> None:
    from gemma_jax.pretrained.end_tokens import END_OF_TURN

    report.line("checkpoint", name)
    report.line("shape", _named_shape(found.config))
    try:
        tokenizer, ends = found.tokenizer(), found.end_tokens()
    except UserError as error:
        report.faults.append(str(error))
        return
    if tokenizer is None:
        report.line("tokenizer", "none beside it; calls with text will not work, those with token ids will")
    else:
        pieces, rows = tokenizer.vocab_size, found.config.vocab_size
        report.line("tokenizer", f"{pieces:,} pieces")
        if pieces < rows:
            added = rows - pieces
            report.line("", f"{added:,} ids of the model have no text, as where fine-tuning has added rows")
        elif pieces > rows:
            report.faults.append(f"the tokenizer has {pieces:,} pieces, the model a vocabulary of {rows:,}")
    kind = "instruction-tuned" if END_OF_TURN in ends else "not known to be instruction-tuned"
    report.line("answers end", f"at {', '.join(map(str, ends))}: {kind}")


def _named_shape(config: TransformerConfig) -> str:
    """Describes a shape by its preset, by its differences from the nearest preset, or by all its fields."""
    fields = [f.name for f in dataclasses.fields(config) if f.name != "vocab_multiple"]

    def unlike(preset: TransformerConfig) -> list[str]:
        return [field for field in fields if getattr(config, field) != getattr(preset, field)]

    nearest, differing = min(((name, unlike(PRESETS[name])) for name in PRESETS), key=lambda x: len(x[1]))
    if not differing:
        return nearest
    if len(differing) > 3:
        return "of no preset: " + ", ".join(f"{field} {getattr(config, field)}" for field in fields)
    told = [f"{field} {getattr(config, field)} for {getattr(PRESETS[nearest], field)}" for field in differing]
    return f"of no preset; unlike {nearest} in {', '.join(told)}"


def _show_statistics(report: Report, weights: "Weights", config: TransformerConfig) -> None:
    from gemma_jax.verification import statistics
    from gemma_jax.weights import EMBEDDING, FINAL_NORM

    found: dict[tuple[str, int | None], Statistics] = {}
    for one in statistics(weights, config):
        found[one.parameter.removeprefix("blocks."), one.layer] = one
        where = weights.where(one.parameter, one.layer)
        if one.not_finite:
            report.faults.append(f"{where} has {one.not_finite:,} numbers that are not finite")
        elif one.smallest == one.largest and one.size > 1 and not one.parameter.endswith("norm"):
            report.faults.append(f"{where} holds nothing but {one.largest:g}")
    in_layer, count = [name for name, layer in found if layer == 0], config.num_layers
    size, dtypes = sum(one.size for one in found.values()), sorted({one.dtype for one in found.values()})
    report.line(
        "weights",
        f"{len(found)} arrays ({len(in_layer)} in each of {count} layers, "
        f"{len(found) - len(in_layer) * count} besides), {size:,} numbers, {', '.join(dtypes)}",
    )

    def norm(one: "Statistics") -> str:
        return f"{1 + one.mean:.2f} ({1 + one.smallest:.2f} to {1 + one.largest:.2f})"

    norms = ("attention_norm", "feed_forward_norm")
    matrices = [name for name in in_layer if name not in norms]
    rows = []
    for layer in range(count):
        bad = sum(found[name, layer].not_finite for name in in_layer)
        rms = [f"{found[name, layer].rms:.4f}" for name in matrices]
        rows.append([str(layer), f"{bad:,}", *(norm(found[name, layer]) for name in norms), *rms])
    titles = ["layer", "not finite", "1 + scale before attention", "before feed-forward"]
    report.table(titles + [f"rms {name.split('.')[1]}" for name in matrices], rows)
    embedding, last = found[EMBEDDING, None], found[FINAL_NORM, None]
    report.line("embedding", f"rms {embedding.rms:.4f}, {embedding.not_finite:,} not finite")
    report.line("final norm", f"1 + scale {norm(last)}, {last.not_finite:,} not finite")


def _compared(report: Report, found: "Checkpoint", config: VerifyConfig) -> bool:
    """Print the differences to transformers. Returns False if they cannot be computed."""
    from pathlib import Path

    import numpy as np

    from gemma_jax.model import compute_dtype
    from gemma_jax.pretrained.huggingface import HuggingFaceDirectory
    from gemma_jax.sharding import make_mesh
    from gemma_jax.verification import layer_outputs, transformers_outputs

    missing = not all(importlib.util.find_spec(package) for package in ("transformers", "torch"))
    is_read = isinstance(found.weights, HuggingFaceDirectory)
    for applies, reason in (
        (found.quantization, "the weights are quantised"),
        (not is_read, "it reads Hugging Face directories; `gemma convert` makes one"),
        (missing, "pip install transformers torch"),
    ):
        if applies:
            report.line("transformers", f"not compared: {reason}")
            return False
    mesh = make_mesh(config.mesh)
    dtype = str(compute_dtype(config.compute, mesh))
    tokenizer = found.tokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode_typed(config.prompt)] if tokenizer else [2, *range(4, 32)]
    ids = [token for token in ids if token < found.config.vocab_size]
    tokens = np.tile(np.array(ids, np.int32), (mesh.size, 1))  # one row per device
    # Only one of the two models is in memory at once.
    spec = _spec(found, config, dtype)
    ours = layer_outputs(spec, found.params(spec), tokens)
    theirs = transformers_outputs(Path(found.folder), dtype, tokens)
    layers = (f"layer_{layer}" for layer in range(found.config.num_layers))
    rows, wrong = [], []
    for place in ("embeddings", *layers, "final_norm", "logits"):
        gap = np.abs(ours[place][0] - theirs[place][0])
        relative = float(np.linalg.norm(gap) / (np.linalg.norm(theirs[place][0]) or 1))
        if not relative <= TOLERANCE[dtype]:
            wrong.append(place)
        rows.append([place.replace("_", " "), f"{gap.max():.2e}", f"{relative:.2e}"])
    text = f"beside transformers, {dtype}, {tokens.shape[1]} tokens"
    report.table([text, "largest difference", "relative"], rows)
    if wrong:
        report.faults.append(
            f"transformers computes something else: {wrong[0].replace('_', ' ')} differs by more than "
            f"{TOLERANCE[dtype]:g} in relative norm"
        )
    return True


def _show_quantised(
    report: Report, found: "Checkpoint", other: "Checkpoint", config: VerifyConfig, text: str
) -> None:
    """Print what quantisation costs: the outputs beside those of the original, and the memory of both."""
    import jax

    from gemma_jax.memory import stored_bytes
    from gemma_jax.verification import compare_logits

    tokenizer = found.tokenizer() or other.tokenizer()
    if tokenizer is None:
        raise UserError(f"{found.name} and {other.name} have no tokenizer, so their outputs have no text.")
    ids = [tokenizer.bos_id, *tokenizer.encode_typed(text)][: config.tokens]
    if len(ids) < 2:
        raise UserError(f"{config.text} has no text; give another file as --text.")
    models = []
    for checkpoint, quantization in ((found, config.quantization), (other, "")):
        dtype = "float32" if checkpoint.dtype == "float16" else checkpoint.dtype
        spec = _spec(checkpoint, config, dtype, quantization)
        models.append((spec, checkpoint.params(spec)))
    compared = compare_logits(models[0], models[1], ids)
    sizes = [sum(stored_bytes(x.shape, x.dtype) for x in jax.tree.leaves(params)) for _, params in models]
    rows = [
        [config.quantization or found.quantization, f"{sizes[0]:,}", f"{compared.perplexity:.4f}"],
        ["original", f"{sizes[1]:,}", f"{compared.other_perplexity:.4f}"],
    ]
    report.table(["weights", "bytes", f"perplexity of {compared.tokens:,} tokens"], rows)
    report.line("likeliest", f"the same token at {compared.agreement:.2%} of the positions")
    report.line("logit error", f"{compared.largest:.4f} at most, {compared.rms:.4f} root mean square")


def _show_differences(report: Report, found: "Checkpoint", other: "Checkpoint", config: VerifyConfig) -> None:
    from gemma_jax.verification import differences

    weights = [_weights(checkpoint, config) for checkpoint in (found, other)]
    all_of_them = list(differences(weights[0], weights[1], found.config))
    differing = [one for one in all_of_them if not one.equal]
    rounded = sum(one.rounded for one in all_of_them)
    how = f"{rounded} of them only once the wider is rounded to the other" if rounded else "bit for bit"
    unlike, count = len(differing), len(all_of_them)
    report.line("against", f"{config.against}: {count - unlike} of {count} arrays are equal, {how}")
    if not differing:
        return
    rows: list[list[Any]] = [
        [weights[0].where(d.parameter, d.layer), f"{d.largest:.2e}", f"{d.relative:.2e}"]
        for d in sorted(differing, key=lambda d: -d.relative)[:SHOWN]
    ]
    report.table(["the most different arrays", "largest difference", "relative"], rows)
    report.faults.append(f"{unlike} of {count} arrays differ from those of {config.against}")
