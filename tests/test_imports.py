"""What is loaded when: help and mistakes without jax, a notebook without what only training needs.

A slow answer is a heavy import, so these tests look at what a process of its own has imported.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "absl", "array_record", "etils", "flax", "grain", "jax", "jaxlib", "matplotlib", "numpy", "optax",
    "orbax", "pandas", "rich", "scipy", "sentencepiece", "tensorboardX", "tensorflow", "tensorflow_datasets",
    "tensorstore", "torch", "wandb",
}  # fmt: skip
# Commands that are answered at once, and the status of each.
ANSWERED = {
    0: ("", *(f"{name} --help" for name in ("pretrain", "sample", "chat", "verify", "inspect", "convert"))),
    2: (
        *("pretrian", "pretrain dmeo", "pretrain demo --steps many", "pretrain demo --data.batch_size 7"),
        *("sample runs/demo", "sample runs/demo --top_p 2 --prompt x", "chat runs/demo --samples 2"),
        *("convert runs/demo", "plan gemma_2b", "plan gemma_2b --topology v9-8", "inspect random:gemma_2c"),
    ),
}


def imported(code: str) -> set[str]:
    """Top-level modules that are loaded in a fresh process after some code."""
    code += "; import sys, json; print('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_help_and_mistakes_are_answered_without_anything_heavy() -> None:
    program = """
from gemma_jax.cli import main
for status, commands in {answered!r}.items():
    for command in commands:
        try:
            actual = main(command.split())
        except SystemExit as end:
            actual = end.code
        assert actual == status, (command, actual)
0"""
    assert imported(program.format(answered=ANSWERED)) & HEAVY == set()


def test_a_notebook_loads_nothing_that_only_training_needs() -> None:
    """flax.nnx brings optax with it; what must not come is what is ours to leave out."""
    modules = imported("from gemma_jax import Gemma")
    assert "jax" in modules and "gemma_jax" in modules
    assert (modules - imported("import jax, flax.nnx")) & HEAVY <= {"sentencepiece"}


def test_tensorflow_and_torch_are_loaded_by_no_module() -> None:
    every = "import pkgutil, importlib, gemma_jax; "
    every += (
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(gemma_jax.__path__, 'gemma_jax.')]"
    )
    modules = imported(every)
    assert {"orbax", "optax", "jax"} <= modules  # it did load what there is
    assert modules & {"tensorflow", "torch"} == set()


def test_processes_that_tokenise_load_no_jax() -> None:
    assert imported("import gemma_jax.data.loader") & HEAVY <= {"numpy", "etils"}
