"""Saved runs for the tests of checkpoints."""

import shutil
from pathlib import Path

import pytest

from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import TrainState, abstract_train_state
from tests.checkpoint.states import CONFIG, KEEP_ALL, random_state, save


@pytest.fixture(scope="module")
def states() -> dict[int, TrainState]:
    return {step: random_state(step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def three_saved(states: dict[int, TrainState], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with whole checkpoints of steps 1, 2 and 3. Copied by the tests that change it."""
    run = tmp_path_factory.mktemp("saved") / "run"
    with CheckpointStore(run, KEEP_ALL) as store:
        for step, state in states.items():
            save(store, step, state)
    return run


@pytest.fixture
def run(three_saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(three_saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def abstract() -> TrainState:
    return abstract_train_state(pretraining(CONFIG, cpu_mesh(8, fsdp=4, tensor=2)))
