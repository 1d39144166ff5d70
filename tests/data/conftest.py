import pytest
from corpora import random_texts

from gemma_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return Tokenizer.train(random_texts(200, seed=99), 512, path)
