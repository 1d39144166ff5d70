"""A run with its directory on S3, which moto emulates."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath
from etils.epath import backend

from gemma_jax.checkpoint.folders import saved_steps
from gemma_jax.checkpoint.record import run_record
from gemma_jax.cli import main
from gemma_jax.config import replace, to_json
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming
from tests.tiny_run import config, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket() -> Iterator[epath.Path]:
    # Installed by `make test-slow` alone.
    import s3fs
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        path = epath.Path("s3://bucket")
        path.mkdir()
        yield path
        server.stop()


def test_a_run_on_s3_is_trained_resumed_forked_sampled_replayed_and_deleted(
    bucket: epath.Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(bucket / "corpus")
    texts = [path.read_text() for path in (bucket / "corpus").glob("*.txt")]
    Tokenizer.train(texts, 430, "s3://bucket/small.model")
    changes = {"tokenizer.path": "s3://bucket/small.model", "evaluation.every": 2}
    changes |= {"checkpoint.every": 2, "checkpoint.keep_last": 2, "checkpoint.keep_best": 1}
    s3_config = replace(config("", "s3://bucket/corpus", "s3://bucket/cache"), changes)
    (tmp_path / "config.json").write_text(to_json(s3_config))

    def train(run: str, steps: int, *more: str) -> int:
        run_dir = ("--run_dir", f"s3://bucket/runs/{run}", "--steps", str(steps))
        return main(["pretrain", str(tmp_path / "config.json"), *run_dir, *more])

    run, steps = bucket / "runs" / "a", bucket / "runs" / "a" / "checkpoints"
    assert train("a", 8) == 0
    assert saved_steps(run) == [6, 8] and {path.name for path in steps.iterdir()} == {"6", "8"}
    before = run_record(steps / "8")
    (steps / "8" / "params" / "manifest.ocdbt").unlink()
    (steps / "7" / "params" / "manifest.ocdbt").write_text("")  # what a kill leaves
    (steps / "7.unfinished").write_text("")
    assert train("a", 8) == 0
    said = capsys.readouterr().err
    assert re.search(
        naming("step 8", "params/manifest.ocdbt", "s3://bucket/runs/a/checkpoints/8.damaged"), said
    )
    assert re.search(naming("resuming", "s3://bucket/runs/a", 6, 8), said)
    assert {path.name for path in steps.iterdir()} == {"6", "8", "8.damaged"}
    assert run_record(steps / "8").arrays == before.arrays  # which are the fingerprints too
    assert train("fork", 10, "--fork_from", f"{steps}/8", "--optimizer.learning_rate", "1e-3") == 0
    assert train("fork", 2, "--existing_run", "overwrite") == 0
    assert saved_steps(bucket / "runs" / "fork") == [2]
    capsys.readouterr()
    for checkpoint in (f"{run}", f"{steps}/6"):
        assert main(["sample", checkpoint, "--prompt", "alpha", "--max_new_tokens", "4"]) == 0
        assert capsys.readouterr().out.startswith("alpha")
        assert main(["inspect", checkpoint]) == 0
        assert "blocks.attention.q" in capsys.readouterr().out
    assert main(["replay", str(run), "7", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[0])
    assert summary["loss"] == pytest.approx(summary["logged"]["loss"], rel=1e-6)
    assert main(["runs", "s3://bucket/runs"]) == 0
    assert capsys.readouterr().out.count("8/8") == 1
