"""A mistake of the user ends any command with status 2, one sentence that names it, and no harm."""

from pathlib import Path

import pytest

from gemma_jax.cli import main
from tests.tiny_run import config_file

# Commands, with the part of the sentence that names the mistake.
MISTAKES = {
    "pretrain {config} --data.sources /nowhere/*.txt": "/nowhere/*.txt",
    "pretrain {config} --tokenizer.path {config}": "config.json",
    "pretrain {config} --mesh.fsdp 64 --mesh.cpu_devices 0": "64 devices",
    "pretrain {config} --data.batch_size 7": "use 8",
    "pretrain {config} --model.embed_dim 33": "axis 'embed' of size 33",
    "pretrain {config} --optimizer.learning_rat 1": "did you mean --optimizer.learning_rate?",
    "sample --prompt x": "name a checkpoint first",
    "sample {run}": "add --prompt TEXT",
    "sample {tmp}/damaged --prompt x": "{tmp}/damaged",
    "sample {config} --prompt x": "config.json",
    # Larger than this machine: it is refused before any weights are made.
    "sample random:gemma_7b --prompt x": "random:gemma_7b has no tokenizer.model",
    "sample {run} --prompt x --top_p 0": "top_p is 0.0",
    "sample {run} --prompt {long} --mesh.cpu_devices 1": "context holds 256",
    "sample {run} --prompt \udcff --mesh.cpu_devices 1": "surrogate",
    "chat {run} --instruction_tuned no": "--instruction_tuned yes",
    "chat {run} --samples 2": "samples is 2",
    "inspect": "name a config or a checkpoint first",
    "inspect {tmp}/damaged": "{tmp}/damaged",
    "inspect gemma_tiny --mesh.tensor 8": "blocks.attention.o: axis 'heads' of size 4",
    "replay {run} 9": "has no step 9; its steps are 1 to 8",
    "replay {tmp}/nowhere 1": "is not the directory of a run",
    "replay {run} 1 --mesh.cpu_devices 3": "which data 1 x fsdp 3",
    "convert {run} {tmp}/out --format gguf": "gguf",
    "convert {tmp}/nothing {tmp}/out": "there is no checkpoint",
    "runs {tmp}/nowhere": "no directory",
    "runs {runs} --plot curves.pdf": "ends in .png",
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
    assert line.startswith("error: ") and MISTAKES[command].format(**names) in line
    assert captured.out == "" and set(tmp_path.rglob("*")) == before
