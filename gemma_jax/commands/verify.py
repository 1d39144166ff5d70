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
    other = open_checkpoint(config.against) if config.against else None
    found.kind(config.quantization)  # refuses what is quantised already
    text = read_text(os.path.expanduser(config.text), LARGE_FILE) if config.text else config.prompt
    if config.quantization:
        other = other or found
    _show_shape(report, name, found)
    # Any error in the files on disk is a fault of the checkpoint, not a mistake of the user.
    try:
        weights = _weights(found, config)
        _show_statistics(report, weights, found.config)
        if other is not None and (config.quantization or found.quantization):
            _show_quantised(report, found, other, config, text)
            checked.append("outputs beside the original")
        elif other is not None:
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
    from gemma_jax.model import ModelSpec
    from gemma_jax.pretrained.export import PlacedWeights
    from gemma_jax.sharding import make_mesh

    compute = replace(config.compute, {"param_dtype": found.dtype})
    spec = ModelSpec(found.config, compute, make_mesh(config.mesh), found.kind())
    return PlacedWeights(found.params(spec), spec)


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
        report.line("tokenizer", f"{tokenizer.vocab_size:,} pieces")
        rows = found.config.vocab_size
        if tokenizer.vocab_size < rows:
            count = rows - tokenizer.vocab_size
            report.line("", f"{count:,} ids of the model have no text, as where fine-tuning has added rows")
        elif tokenizer.vocab_size > rows:
            report.faults.append(
                f"the tokenizer has {tokenizer.vocab_size:,} pieces, the model a vocabulary of {rows:,}"
            )
    kind = "instruction-tuned" if END_OF_TURN in ends else "not known to be instruction-tuned"
    report.line("answers end", f"at {', '.join(map(str, ends))}: {kind}")


def _named_shape(config: TransformerConfig) -> str:
    """Describes a shape by its preset, by its differences from the nearest preset, or by all its fields."""
    fields = [f.name for f in dataclasses.fields(config) if f.name != "vocab_multiple"]

    def unlike(preset: TransformerConfig) -> list[str]:
        return [field for field in fields if getattr(config, field) != getattr(preset, field)]

    nearest = min(PRESETS, key=lambda name: len(unlike(PRESETS[name])))
    differing = unlike(PRESETS[nearest])
    if not differing:
        return nearest
    if len(differing) > 3:
        return "of no preset: " + ", ".join(f"{field} {getattr(config, field)}" for field in fields)
    told = [f"{field} {getattr(config, field)} for {getattr(PRESETS[nearest], field)}" for field in differing]
    return f"of no preset; unlike {nearest} in {', '.join(told)}"


def _show_statistics(report: Report, weights: "Weights", config: TransformerConfig) -> None:
    from gemma_jax.verification import statistics
    from gemma_jax.weights import EMBEDDING, FINAL_NORM

    layers: dict[int | None, dict[str, Statistics]] = {}
    arrays, size, dtypes = 0, 0, set()
    for one in statistics(weights, config):
        layers.setdefault(one.layer, {})[one.parameter.removeprefix("blocks.")] = one
        arrays, size = arrays + 1, size + one.size
        dtypes.add(one.dtype)
        where = weights.where(one.parameter, one.layer)
        if one.not_finite:
            report.faults.append(f"{where} has {one.not_finite:,} numbers that are not finite")
        elif one.smallest == one.largest and one.size > 1 and not one.parameter.endswith("norm"):
            report.faults.append(f"{where} holds nothing but {one.largest:g}")
    a_layer, count = len(layers[0]), config.num_layers
    report.line(
        "weights",
        f"{arrays} arrays ({a_layer} in each of {count} layers, {arrays - a_layer * count} besides), "
        f"{size:,} numbers, {', '.join(sorted(dtypes))}",
    )

    def norm(one: "Statistics") -> str:
        return f"{1 + one.mean:.2f} ({1 + one.smallest:.2f} to {1 + one.largest:.2f})"

    matrices = [f"attention.{name}" for name in ("q", "k", "v", "o")]
    matrices += [f"feed_forward.{name}" for name in ("gate", "up", "down")]
    rows = []
    for layer in range(config.num_layers):
        of_layer = layers[layer]
        rms = [f"{of_layer[matrix].rms:.4f}" for matrix in matrices]
        bad = sum(one.not_finite for one in of_layer.values())
        scales = [norm(of_layer[name]) for name in ("attention_norm", "feed_forward_norm")]
        rows.append([str(layer), f"{bad:,}", *scales, *rms])
    report.table(
        ["layer", "not finite", "1 + scale before attention", "before feed-forward"]
        + [f"rms {matrix.split('.')[1]}" for matrix in matrices],
        rows,
    )
    embedding, last = layers[None][EMBEDDING], layers[None][FINAL_NORM]
    report.line("embedding", f"rms {embedding.rms:.4f}, {embedding.not_finite:,} not finite")
    report.line("final norm", f"1 + scale {norm(last)}, {last.not_finite:,} not finite")


def _compared(report: Report, found: "Checkpoint", config: VerifyConfig) -> bool:
    """Print the differences to transformers. Returns False if they cannot be computed."""
    from pathlib import Path

    import numpy as np

    from gemma_jax.model import ModelSpec, compute_dtype
    from gemma_jax.pretrained.huggingface import HuggingFaceDirectory
    from gemma_jax.sharding import make_mesh
    from gemma_jax.verification import layer_outputs, transformers_outputs

    if found.quantization:
        report.line("transformers", "not compared: the weights are quantised")
        return False
    if not isinstance(found.weights, HuggingFaceDirectory):
        report.line(
            "transformers", "not compared: it reads Hugging Face directories; `gemma convert` makes one"
        )
        return False
    if not all(importlib.util.find_spec(package) for package in ("transformers", "torch")):
        report.line("transformers", "not compared: pip install transformers torch")
        return False
    mesh = make_mesh(config.mesh)
    dtype = str(compute_dtype(config.compute, mesh))
    tokenizer = found.tokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode_typed(config.prompt)] if tokenizer else [2, *range(4, 32)]
    ids = [token for token in ids if token < found.config.vocab_size]
    tokens = np.tile(np.array(ids, np.int32), (mesh.size, 1))  # one row per device
    compute = replace(config.compute, {"param_dtype": dtype})
    # Only one of the two models is in memory at once.
    spec = ModelSpec(found.config, compute, mesh)
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
    from gemma_jax.model import ModelSpec
    from gemma_jax.sharding import make_mesh
    from gemma_jax.verification import compare_logits

    if replace(found.config, {"vocab_multiple": 1}) != replace(other.config, {"vocab_multiple": 1}):
        report.faults.append(f"{other.name} is a model of another shape")
        return
    tokenizer = found.tokenizer() or other.tokenizer()
    if tokenizer is None:
        raise UserError(f"{found.name} and {other.name} have no tokenizer, so their outputs have no text.")
    ids = [tokenizer.bos_id, *tokenizer.encode_typed(text)][: config.tokens]
    if len(ids) < 2:
        raise UserError(f"{config.text} has no text; give another file as --text.")
    models = []
    mesh = make_mesh(config.mesh)
    for checkpoint, kind in ((found, found.kind(config.quantization)), (other, other.kind())):
        dtype = "float32" if checkpoint.dtype == "float16" else checkpoint.dtype
        spec = ModelSpec(checkpoint.config, replace(config.compute, {"param_dtype": dtype}), mesh, kind)
        models.append((spec, checkpoint.params(spec)))
    compared = compare_logits(models[0], models[1], ids)
    sizes = [sum(stored_bytes(x.shape, x.dtype) for x in jax.tree.leaves(params)) for _, params in models]
    report.table(
        ["weights", "bytes", f"perplexity of {compared.tokens:,} tokens"],
        [
            [config.quantization or found.quantization, f"{sizes[0]:,}", f"{compared.perplexity:.4f}"],
            ["original", f"{sizes[1]:,}", f"{compared.other_perplexity:.4f}"],
        ],
    )
    report.line("likeliest", f"the same token at {compared.agreement:.2%} of the positions")
    report.line("logit error", f"{compared.largest:.4f} at most, {compared.rms:.4f} root mean square")


def _show_differences(report: Report, found: "Checkpoint", other: "Checkpoint", config: VerifyConfig) -> None:
    from gemma_jax.verification import differences

    ours, theirs = (dataclasses.asdict(replace(c.config, {"vocab_multiple": 1})) for c in (found, other))
    unlike = [field for field in ours if ours[field] != theirs[field]]
    if unlike:
        told = ", ".join(f"{field} {ours[field]} and {theirs[field]}" for field in unlike)
        report.faults.append(f"{config.against} is of another shape: {told}")
        return
    weights = [_weights(checkpoint, config) for checkpoint in (found, other)]
    all_of_them = list(differences(weights[0], weights[1], found.config))
    differing = [one for one in all_of_them if not one.equal]
    rounded = sum(one.rounded for one in all_of_them)
    how = f"{rounded} of them only once the wider is rounded to the other" if rounded else "bit for bit"
    equal = len(all_of_them) - len(differing)
    report.line("against", f"{config.against}: {equal} of {len(all_of_them)} arrays are equal, {how}")
    if not differing:
        return
    rows: list[list[Any]] = [
        [weights[0].where(d.parameter, d.layer), f"{d.largest:.2e}", f"{d.relative:.2e}"]
        for d in sorted(differing, key=lambda d: -d.relative)[:SHOWN]
    ]
    report.table(["the most different arrays", "largest difference", "relative"], rows)
    report.faults.append(
        f"{len(differing)} of {len(all_of_them)} arrays differ from those of {config.against}"
    )
