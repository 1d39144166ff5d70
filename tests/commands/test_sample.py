"""`gemma sample` as a person calls it."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import MeshConfig
from gemma_jax.data.chat import encode_dialogue
from tests.messages import naming

PROMPTS = ("alpha beta", "gamma", "tau sigma rho pi\nomicron")
FIVE = ("--max_new_tokens", "5", "--mesh.cpu_devices", "1")


@pytest.fixture
def run(tiny_run: Path) -> Path:
    return tiny_run


def sample(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command prints on standard output."""
    capsys.readouterr()
    assert main(["sample", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def prompts(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--prompt", text)]


def test_json_is_one_object_a_prompt_and_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = sample(capsys, run, *prompts(*PROMPTS), *FIVE, "--json")
    objects = [json.loads(line) for line in output.splitlines()]
    assert [entry["prompt"] for entry in objects] == list(PROMPTS)
    gemma = Gemma.from_pretrained(run, mesh=MeshConfig(cpu_devices=1))
    for entry, expected in zip(objects, gemma.generate(PROMPTS, max_new_tokens=5), strict=True):
        fields = {"text", "token_ids", "log_probs", "finish_reason", "top_log_probs", "prompt_log_probs"}
        assert entry.keys() == {"prompt", "turn", *fields}
        assert entry["top_log_probs"] == entry["prompt_log_probs"] == []
        assert entry["turn"] is False
        assert entry["text"] == expected.text == gemma.tokenizer.decode(entry["token_ids"])
        assert entry["token_ids"] == expected.token_ids and len(entry["token_ids"]) <= 5
        assert entry["finish_reason"] == expected.finish_reason
        assert np.allclose(entry["log_probs"], expected.log_probs, rtol=1e-5)


def test_text_is_each_prompt_with_what_follows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = sample(capsys, run, *prompts(*PROMPTS), *FIVE, "--json").splitlines()
    wholes = [entry["prompt"] + entry["text"] for entry in map(json.loads, lines)]
    shown = sample(capsys, run, *prompts(*PROMPTS), *FIVE)
    assert sample(capsys, run, "--prompt", *PROMPTS, *FIVE) == shown
    for number, whole in enumerate(wholes, start=1):  # each under a line with its number
        before, _, shown = shown.partition(f"{whole}\n")
        assert len(before.splitlines()) == 1 and str(number) in before
    assert shown == ""


def test_a_step_is_a_checkpoint_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_run = sample(capsys, run, *prompts("alpha"), *FIVE)
    assert sample(capsys, run / "checkpoints" / "8", *prompts("alpha"), *FIVE) == of_run


def test_settings_reach_the_sampler(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*settings: str) -> list[int]:
        return json.loads(sample(capsys, run, *prompts("alpha"), *FIVE, "--json", *settings))["token_ids"]

    greedy = tokens()
    hot = ("--temperature", "3")
    assert tokens(*hot, "--seed", "1") == tokens(*hot, "--seed", "1") != tokens(*hot, "--seed", "2")
    assert tokens(*hot, "--top_k", "1") == tokens(*hot, "--top-p", "1e-6") == greedy
    assert tokens("--max_new_tokens", "2") == greedy[:2]
    assert tokens(*hot, "--min_p", "1") == greedy
    assert tokens("--end_tokens", "3", str(greedy[-1])) == greedy[: greedy.index(greedy[-1])]
    assert greedy[0] not in tokens("--forbidden_tokens", *map(str, greedy))
    biased = ("--logit_bias", "300 bias=200", "301 bias=100", "--repetition_penalty", "9")
    assert tokens(*biased) == [300, 301, 300, 300, 300]
    listed = ("--top_log_probs", "2", "--prompt_log_probs")
    [entry] = map(json.loads, sample(capsys, run, *prompts("alpha"), *FIVE, "--json", *listed).splitlines())
    assert [of_token[0][0] for of_token in entry["top_log_probs"]] == greedy
    assert [of_token[0][1] for of_token in entry["top_log_probs"]] == entry["log_probs"]
    assert np.shape(entry["top_log_probs"]) == (len(greedy), 2, 2)
    [scores] = Gemma.from_pretrained(run, mesh=MeshConfig(cpu_devices=1)).score(["alpha"])
    assert np.allclose(entry["prompt_log_probs"], scores, rtol=1e-5)


WRONG: dict[str, tuple[list[str], str]] = {
    "empty prompt": (["--prompt", ""], naming("prompt", "empty")),
    "long prompt": (["--prompt", "alpha " * 2000], naming("tokens", 1)),
    "not UTF-8": (["--prompt", "alpha \udcff"], "UTF-8|surrogate|unicode|Unicode"),
    "no new tokens": (["--max_new_tokens", "0"], naming("max_new_tokens", 0)),
    "too many samples": (["--samples", str(10**9)], naming("1,000,000,000", "GiB")),
    "temperature": (["--temperature", "nan"], naming("temperature", "nan")),
    "forbidden token": (["--forbidden_tokens", "99999"], naming("forbidden_tokens", 99999)),
    "end token": (["--end_tokens", "-4"], "end_tokens.*-4"),
    "bias": (["--logit_bias", "99999 bias=1"], naming("logit_bias", 99999)),
    "no bias": (["--logit_bias", "5"], naming("logit_bias", "bias", "nan")),
    "bias of a word": (["--logit_bias", "alpha bias=1"], naming("token", "alpha")),
    "many alternatives": (["--json", "--top_log_probs", "1000"], naming("top_log_probs", 1000)),
    "alternatives as text": (["--top_log_probs", "3"], naming("top_log_probs", "--json")),
    "alternatives in a stream": (["--stream", "--top_log_probs", "3"], naming("top_log_probs", 3)),
    "stop": (["--stop", ""], naming("stop", "empty")),
    "prompt to compile for": (["--precompile"], naming("precompile", "prompt")),
}


@pytest.mark.parametrize(("words", "told"), WRONG.values(), ids=WRONG)
def test_mistakes_are_told_before_the_weights_are_read(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(Gemma, "from_pretrained", None)
    given = words if "--prompt" in words else [*prompts("alpha"), *words]
    assert main(["sample", str(run), *given, "--mesh.cpu_devices", "1"]) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that keeps the programs compiled now, however fast."""
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is settings:
            yield tmp_path


def test_what_was_compiled_before_is_found(
    run: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts of several lengths, whose texts outgrow their cache, compile nothing more."""
    settings = {"max_new_tokens": 200, "samples": 2, "top_log_probs": 2}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    told = sample(capsys, run, "--precompile", *words, "--mesh.cpu_devices", "1")
    count = int(told.split()[0])  # the line says how many programs are in which folder
    assert 0 < count <= len([*programs.glob("*-cache")])
    gemma, events = Gemma.from_pretrained(run, mesh=MeshConfig(cpu_devices=1)), []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    for length in (1, 20, 50):
        gemma.generate([[2] * length], **settings)
    assert "/jax/compilation_cache/cache_hits" in events
    assert "/jax/compilation_cache/cache_misses" not in events


@pytest.mark.parametrize("name", ["samples", "batch_size"])
def test_nothing_is_compiled_for_what_does_not_fit(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = ["--precompile", f"--{name}", str(10**9), "--mesh.cpu_devices", "1"]
    assert main(["sample", str(run), *words]) == 2
    assert re.search(naming("1,000,000,000", "GiB"), capsys.readouterr().err)


def test_a_prompt_is_text_and_no_control_token(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A turn marker that somebody types must not become the marker, nor an option's name an option."""
    marker = sample(capsys, run, *prompts("<start_of_turn>"), *FIVE, "--json")
    assert json.loads(marker)["prompt"] == "<start_of_turn>"
    assert sample(capsys, run, *prompts("--top-k of alpha"), *FIVE).startswith("--top-k of alpha")


def test_an_instruction_tuned_model_gets_the_prompt_as_a_turn(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = ("--instruction_tuned", "yes")
    gemma = Gemma.from_pretrained(run, mesh=MeshConfig(cpu_devices=1), instruction_tuned=True)
    ids = encode_dialogue(gemma.tokenizer, [{"role": "user", "content": "alpha"}], answer=True)
    [expected] = gemma.generate([ids], max_new_tokens=5)
    assert main(["sample", str(run), *prompts("alpha"), *FIVE, *flag]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"alpha\n{expected.text}\n"
    assert re.search(naming(run, "--raw"), captured.err)
    assert sample(capsys, run, *prompts("alpha"), *FIVE, *flag, "--stream") == captured.out
    [entry] = map(json.loads, sample(capsys, run, *prompts("alpha"), *FIVE, *flag, "--json").splitlines())
    assert entry["turn"] is True and entry["token_ids"] == expected.token_ids
    raw = sample(capsys, run, *prompts("alpha"), *FIVE, *flag, "--raw", "--json")
    assert raw == sample(capsys, run, *prompts("alpha"), *FIVE, "--json") != captured.out


def test_prompts_of_a_file_have_settings_of_their_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ['{"prompt": "alpha", "max_new_tokens": 2}', "", '{"prompt": "gamma", "samples": 2}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    made = sample(capsys, run, "--prompt_file", tmp_path / "prompts.jsonl", *FIVE, "--json")
    objects = [json.loads(line) for line in made.splitlines()]
    assert [entry["prompt"] for entry in objects] == ["alpha", "gamma", "gamma"]
    assert len(objects[0]["token_ids"]) <= 2 < len(objects[1]["token_ids"])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert sample(capsys, run, "--prompt_file", "-", *FIVE, "--json") == made
    # Any other file is one prompt, line breaks included.
    (tmp_path / "prompt.txt").write_text(PROMPTS[2] + "\n")
    whole = sample(capsys, run, "--prompt", PROMPTS[2], *FIVE)
    assert sample(capsys, run, "--prompt_file", tmp_path / "prompt.txt", *FIVE) == whole


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"text": "alpha"}', naming("line 2", "prompt")),
        ('{"prompt": "alpha", "temprature": 1}', naming("line 2", "temprature")),
        ('{"prompt": "alpha", "top_p": 2}', naming("line 2", "top_p", 2.0)),
        ("alpha", naming("line 2", "JSON")),
    ],
)
def test_a_wrong_line_of_a_file_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, named: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "alpha"}\n' + line)
    assert main(["sample", str(run), "--prompt_file", str(tmp_path / "prompts.jsonl")]) == 2
    captured = capsys.readouterr()
    assert re.search(named, captured.err) and captured.out == ""
