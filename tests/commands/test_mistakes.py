"""A mistake of the user ends any command with status 2, one sentence that names it, and no harm."""

import re
from pathlib import Path

import pytest

from gemma_jax.cli import main
from tests.messages import naming
from tests.tiny_run import config_file

# Commands, with the data that the sentence must name, in this order.
MISTAKES = {
    "pretrain {config} --data.sources /nowhere/*.txt": "/nowhere/*.txt",
    "pretrain {config} --tokenizer.path {config}": "config.json",
    "pretrain {config} --mesh.fsdp 64 --mesh.cpu_devices 0": "fsdp 64 64 mesh.cpu_devices",
    "pretrain {config} --data.batch_size 7": "data.batch_size 7 8",
    "pretrain {config} --model.embed_dim 33": "'embed' 33 fsdp",
    "pretrain {config} --optimizer.learning_rat 1": "--optimizer.learning_rat --optimizer.learning_rate",
    "sample --prompt x": "sample CHECKPOINT",
    "sample {run}": "--prompt TEXT",
    "sample {tmp}/damaged --prompt x": "{tmp}/damaged",
    "sample {config} --prompt x": "config.json",
    # Larger than this machine: it is refused before any weights are made.
    "sample random:gemma_7b --prompt x": "random:gemma_7b tokenizer.model",
    "sample {run} --prompt x --top_p 0": "top_p 0.0",
    "sample {run} --prompt {long} --mesh.cpu_devices 1": "tokens 1 256",
    "sample {run} --prompt \udcff --mesh.cpu_devices 1": "U+DCFF",
    "chat {run} --instruction_tuned no": "--instruction_tuned yes",
    "chat {run} --samples 2": "samples 2",
    "inspect": "inspect CONFIG_OR_CHECKPOINT",
    "inspect {tmp}/damaged": "{tmp}/damaged",
    "inspect gemma_tiny --mesh.tensor 8": "blocks.attention.o 'heads' 4 tensor 8",
    "replay {run} 9": "{run} 9 1 8",
    "replay {tmp}/nowhere 1": "{tmp}/nowhere config.json",
    "replay {run} 1 --mesh.cpu_devices 3": "data.batch_size fsdp 3",
    "convert {run} {tmp}/out --format ggml": "ggml",
    "convert {tmp}/nothing {tmp}/out": "{tmp}/nothing random:PRESET",
    "runs {tmp}/nowhere": "{tmp}/nowhere",
    "runs {runs} --plot curves.pdf": ".png",
    "plan gemma_2b": "--topology v5e-256",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_ends_in_one_sentence_and_harms_nothing(
    command: str, tmp_path: Path, corpus: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"config": config_file(tmp_path, corpus), "run": str(tiny_run), "runs": str(tiny_run.parent)}
    names |= {"tmp": str(tmp_path), "long": "alpha," * 300}
    (tmp_path / "damaged" / "run").mkdir(parents=True)
    (tmp_path / "damaged" / "run" / "data.json").write_text("{}")
    before = set(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([word.format(**names) for word in command.split(" ")]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.search(naming("error: ", *MISTAKES[command].format(**names).split()), line), line
    assert captured.out == "" and set(tmp_path.rglob("*")) == before
