"""The whole way in one test: text files in, sampled text out, on a mesh of eight devices.

Read it to see how the parts fit together; docs/architecture.md says why.
"""

from pathlib import Path

import jax
import numpy as np

from gemma_jax import Gemma
from gemma_jax.checkpoint.record import RunRecord
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import (
    PRESETS,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    replace,
    to_dict,
    validate,
)
from gemma_jax.data.documents import open_source, sample_texts
from gemma_jax.data.loader import prepare
from gemma_jax.sharding import local_rows, put_batch
from gemma_jax.testing import cpu_mesh, relative_difference
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import create_train_state
from gemma_jax.training.step import make_train_step

VERSE = "the cat sat on the mat and the dog sat on the log\n"


def test_text_file_to_sampled_text(tmp_path: Path) -> None:
    # Documents: one text file each.
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(f"{number}: " + VERSE * 3, encoding="utf-8")
    config = PretrainConfig(
        steps=60,
        model=replace(PRESETS["gemma_tiny"], {"vocab_size": 430}),
        data=DataConfig(
            sources=(f"{tmp_path}/*.txt",),
            sequence_length=64,
            batch_size=8,
            held_out=0.1,
            cache_dir=str(tmp_path / "cache"),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        mesh=MeshConfig(fsdp=4, tensor=2),
    )
    validate(config)
    mesh = cpu_mesh(8, fsdp=4, tensor=2)

    # A tokenizer trained on the documents that are not held out.
    source = open_source(config.data.sources[0], text_field="text", bad_records="error")
    texts = sample_texts([source], megabytes=1, held_out=config.data.held_out)
    tokenizer = Tokenizer.train(texts, config.model.vocab_size, tmp_path / "run" / "tokenizer.model")

    # The token cache and the row index; then rows by number. A segment begins with <bos>, and each
    # target is the token after its input.
    dataset = prepare(config.data, tokenizer, config.seed)
    rows = dataset.train.batch(0, config.data.batch_size)
    assert (rows.tokens[:, 0] == tokenizer.bos_id).all()
    inside = (rows.positions[:, 1:] > 0) & (rows.segment_ids[:, 1:] > 0)
    np.testing.assert_array_equal(rows.tokens[:, 1:][inside], rows.targets[:, :-1][inside])

    # Training: each batch is put on the mesh, and the step turns one state into the next.
    state = create_train_state(pretraining(config, mesh))
    train_step = make_train_step(pretraining(config, mesh))
    losses = []
    with dataset.train.iterate(
        0, config.data.batch_size, local_rows(config.data.batch_size, mesh)
    ) as batches:
        for _ in range(config.steps):
            state, metrics = train_step(state, put_batch(next(batches), config.data.batch_size, mesh))
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 < np.log(config.model.vocab_size) < losses[0]

    # A checkpoint, and the model out of it, on other devices than it was trained on.
    store = CheckpointStore(tmp_path / "run", config.checkpoint)
    rows_seen = config.steps * config.data.batch_size
    store.save(RunRecord(step=config.steps, rows_seen=rows_seen, config=to_dict(config)), state.parts)
    store.close()
    gemma = Gemma.from_pretrained(tmp_path / "run", mesh=MeshConfig(cpu_devices=2))

    # Sampling: the prompt goes through prefill, each new token through decode and select. The prompt is
    # the beginning of a document, cut where a token ends.
    document = "7: " + VERSE * 3
    prompt = gemma.tokenizer.decode(tokenizer.encode(document)[:12])
    generation = gemma.generate([prompt], max_new_tokens=64)[0]
    assert prompt + generation.text == document
    assert generation.finish_reason == "stop"

    # What generate said of its tokens is what one forward pass says: of tokens that are not certain, whose
    # log-probabilities are not all rounding.
    generation = gemma.generate([prompt], max_new_tokens=16, temperature=3.0, seed=1)[0]
    assert min(generation.log_probs) < -1
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    logits = gemma.logits([ids + generation.token_ids])
    log_probs = jax.nn.log_softmax(logits[0, len(ids) - 1 : -1])
    chosen = np.take_along_axis(np.asarray(log_probs), np.array(generation.token_ids)[:, None], axis=1)[:, 0]
    assert relative_difference(generation.log_probs, chosen) < 1e-4
