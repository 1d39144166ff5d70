"""What is loaded when: help and mistakes without jax, a notebook without what only training needs.

A slow answer is a heavy import, so these tests look at what was imported, in a process of its own;
seconds depend on the machine and are shown only where a test fails.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "absl", "array_record", "etils", "flax", "grain", "jax", "jaxlib", "matplotlib", "numpy", "optax",
    "orbax", "pandas", "rich", "scipy", "sentencepiece", "tensorboardX", "tensorflow", "tensorflow_datasets",
    "tensorstore", "torch", "wandb",
}  # fmt: skip

PROGRAM = """
import json, runpy, sys
status = 0
try:
    {code}
except SystemExit as exit:
    status = exit.code
print("\\n" + json.dumps([status, sorted(sys.modules)]))
"""


def imported(code: str) -> tuple[object, set[str], str]:
    """Exit status, top-level modules, and everything else that is worth showing, of a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code=code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    *output, last = done.stdout.splitlines()
    status, modules = json.loads(last)
    shown = f"{code} took {seconds:.2f} s\n" + "\n".join(output) + done.stderr
    return status, {name.split(".")[0] for name in modules}, shown


def command(*arguments: str) -> str:
    """What `python -m gemma_jax.cli ...` does."""
    return f"sys.argv = {['gemma', *arguments]!r}; runpy.run_module('gemma_jax.cli', run_name='__main__')"


ANSWERED_AT_ONCE = {
    "help": ((), 0, "usage: gemma COMMAND"),
    "help of pretrain": (("pretrain", "--help"), 0, "--optimizer.learning_rate FLOAT"),
    "help of a config": (("pretrain", "demo", "--help"), 0, "--steps INT"),
    "help of sample": (("sample", "--help"), 0, "--temperature FLOAT"),
    "help of chat": (("chat", "--help"), 0, "--system STR"),
    "several answers": (("chat", "runs/demo", "--samples", "2"), 2, "samples is 2"),
    "help of verify": (("verify", "--help"), 0, "--against STR"),
    "help of inspect": (("inspect", "--help"), 0, "--mesh.fsdp INT"),
    "help of convert": (("convert", "--help"), 0, "--format {huggingface,flax,run}"),
    "one name of convert": (("convert", "runs/demo"), 2, "SOURCE DESTINATION"),
    "help of plan": (("plan", "gemma_2b", "--help"), 0, "--topology STR"),
    "no topology": (("plan", "gemma_2b"), 2, "--topology v5e-256"),
    "unknown topology": (("plan", "gemma_2b", "--topology", "v9-8"), 2, "topology 'v9-8' is not known"),
    "unknown command": (("pretrian",), 2, "did you mean pretrain?"),
    "unknown config": (("pretrain", "dmeo"), 2, "did you mean demo?"),
    "unknown key": (("pretrain", "demo", "--optimizer.learning_rat", "1"), 2, "--optimizer.learning_rate?"),
    "wrong type": (("pretrain", "demo", "--steps", "many"), 2, "'many'"),
    "contradiction": (("pretrain", "demo", "--data.batch_size", "7"), 2, "use 8"),
    "unknown flag of sample": (("sample", "runs/demo", "--temprature", "1"), 2, "--temperature?"),
    "out of range": (("sample", "runs/demo", "--top_p", "2", "--prompt", "x"), 2, "top_p is 2.0"),
    "no prompt": (("sample", "runs/demo"), 2, "--prompt"),
    "unknown preset": (("inspect", "random:gemma_2c"), 2, "did you mean gemma_2b?"),
}


@pytest.mark.parametrize(("arguments", "status", "told"), ANSWERED_AT_ONCE.values(), ids=ANSWERED_AT_ONCE)
def test_help_and_mistakes_in_a_config_are_told_without_anything_heavy(
    arguments: tuple[str, ...], status: int, told: str
) -> None:
    actual, modules, shown = imported(command(*arguments))
    assert told in shown
    assert actual == status, shown
    assert modules & HEAVY == set(), shown


def test_a_notebook_loads_nothing_that_only_training_needs() -> None:
    """flax.nnx brings optax with it; what must not come is what is ours to leave out."""
    _, bare, _ = imported("import jax, flax.nnx")
    _, modules, shown = imported("from gemma_jax import Gemma")
    assert "jax" in modules and "gemma_jax" in modules
    assert (modules - bare) & HEAVY <= {"sentencepiece"}, shown
    assert (
        modules & {"orbax", "grain", "matplotlib", "tensorflow", "tensorflow_datasets", "torch"} == set()
    ), shown


def test_the_package_itself_loads_nothing() -> None:
    _, modules, shown = imported("import gemma_jax; gemma_jax.__version__")
    assert modules & HEAVY == set(), shown


def test_tensorflow_and_torch_are_loaded_by_no_module() -> None:
    every = "import pkgutil, importlib, gemma_jax; "
    every += (
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(gemma_jax.__path__, 'gemma_jax.')]"
    )
    _, modules, shown = imported(every)
    assert {"orbax", "optax", "jax"} <= modules, shown  # it did load what there is
    assert modules & {"tensorflow", "torch"} == set(), shown
