"""Measures training and decoding on one GPU, in parts of at most eight minutes each.

    python benchmarks/gpu.py install [--wheels FOLDER]   # adds what is missing, from a folder or an index
    python benchmarks/gpu.py tests                       # are kernel, training and sampling right?
    python benchmarks/gpu.py train | decode-2b | decode-7b
    python benchmarks/gpu.py peers                       # transformers, PEFT and vLLM, where installed
    python benchmarks/gpu.py merge                       # writes docs/gpu.md and docs/gpu.png

Each part writes gpu-results/PART.json (--out). All weights are random, so nothing is downloaded. With --tiny
a part runs with a tiny model on CPU, as a check of this script. `python benchmarks/gpu.py wheels` downloads
what `install` may need into folders of at most 60 MB, for a machine without a package index.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "gpu.md", ROOT / "docs" / "gpu.png"
PART_SECONDS, FOLDER_BYTES = 8 * 60, 60 * 10**6
# What the parts import beside jax, by the name of the module. None of it brings packages of its own.
NEEDED = {
    "absl": "absl-py",
    "cloudpickle": "cloudpickle",
    "etils": "etils",
    "filelock": "filelock",
    "flax": "flax",
    "fsspec": "fsspec",
    "google.protobuf": "protobuf",
    "importlib_resources": "importlib_resources",
    "markdown_it": "markdown-it-py",
    "mdurl": "mdurl",
    "msgpack": "msgpack",
    "optax": "optax",
    "pygments": "pygments",
    "rich": "rich",
    "sentencepiece": "sentencepiece",
    "treescope": "treescope",
    "typing_extensions": "typing_extensions",
    "yaml": "pyyaml",
    "zipp": "zipp",
}
Result = dict[str, Any]


def main() -> None:
    """Runs one part, or one case of a part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("install", "wheels", *PARTS, "merge", "case"))
    parser.add_argument("case", nargs="?", help="for `case`: its name and arguments as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.part == "install":
        install(options.wheels)
    elif options.part == "wheels":
        download(options.wheels or ROOT / "wheels")
    elif options.part == "merge":
        merge(options.out)
    elif options.part == "case":
        name, arguments = json.loads(options.case)
        result = CASES[name](tiny=options.tiny, **arguments)
        for one in [result] if isinstance(result, dict) else result:
            print(json.dumps(one), flush=True)
    else:
        run_part(options.part, options.out, options.tiny)


def is_missing(module: str) -> bool:
    """Whether a module cannot be found."""
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # not even its parent
        return True


def install(wheels: Path | None) -> None:
    """Installs what is missing, and jax for CUDA only if there is no jax; then jax must find a GPU."""
    names = [package for module, package in NEEDED.items() if is_missing(module)]
    names += ["jax[cuda13]"] if is_missing("jax") else []
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if wheels:
        pip += ["--no-index", *(f"--find-links={folder}" for folder in (wheels, *sorted(wheels.glob("*/"))))]
    plain = [name for name in names if "[" not in name]
    for group in (
        [*pip, "--no-deps", *plain] if plain else [],
        [*pip, *names[len(plain) :]] if len(names) > len(plain) else [],
    ):
        if group:
            subprocess.run(group, check=True)
    # Only a GPU has a compute capability.
    found = "import jax; d = jax.devices(); print(jax.__version__, d[0].compute_capability, d)"
    if subprocess.run([sys.executable, "-c", found]).returncode:
        sys.exit("error: jax finds no GPU; install jax[cuda13], or jax[cuda12] for an older driver.")


def download(wheels: Path) -> None:
    """Downloads the wheels of NEEDED into numbered folders of at most FOLDER_BYTES."""
    together = wheels / "all"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(together)]
    subprocess.run([*pip, *NEEDED.values()], check=True)
    number, size = 1, 0
    for file in sorted(together.iterdir()):
        bytes_of_file = file.stat().st_size
        if size + bytes_of_file > FOLDER_BYTES:
            number, size = number + 1, 0
        size += bytes_of_file
        folder = wheels / str(number)
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    together.rmdir()
    print(f"{wheels}: {number} folders of at most {FOLDER_BYTES // 10**6} MB")


def run_part(part: str, out: Path, tiny: bool) -> None:
    """Runs the cases of a part, each in a process of its own, until the time is over; keeps their results."""
    out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + PART_SECONDS, []
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # so that the last line is the error
    environment["JAX_COMPILATION_CACHE_DIR"] = str(out / "programs")
    environment |= {"JAX_PLATFORMS": "cpu"} if tiny else {}
    for name, arguments in PARTS[part]:
        told: Result = {"case": name, **arguments} | ({"tiny": True} if tiny else {})
        command = [sys.executable, __file__, "case", json.dumps([name, arguments]), *["--tiny"] * tiny]
        failed = ""
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
            left = max(end - time.monotonic(), 1)
            # A session of its own, so that what it starts ends with it and frees the GPU.
            run = functools.partial(subprocess.Popen, env=environment, cwd=ROOT, start_new_session=True)
            process = run(command, stdout=said, stderr=errors)
            try:
                if process.wait(left):
                    errors.seek(0)
                    failed = (errors.read().strip().splitlines() or ["no message"])[-1][:500]
            except subprocess.TimeoutExpired:
                failed = "not finished in the eight minutes of its part"
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            said.seek(0)
            found = [json.loads(line) for line in said if line.startswith("{")]
        for one in found + ([{"error": failed}] if failed else []):
            results.append(told | one)
            print(json.dumps(told | one), flush=True)
        (out / f"{part}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    if any("error" in result for result in results):
        sys.exit(f"{part}: a case has failed; {out / part}.json says which")


def device_of() -> Any:
    """Returns the first device, which must be a GPU unless jax is told to use the CPU."""
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        sys.exit("error: jax finds no GPU; install jax[cuda13] or jax[cuda12], or take --tiny.")
    return device


def figures(seconds: list[float], tokens: int) -> Result:
    """Returns the median speed and what the device tells of itself."""
    import jax

    device = jax.devices()[0]
    statistics_of_memory = device.memory_stats() or {}
    peak = statistics_of_memory.get("peak_bytes_in_use")
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "tokens_per_second": round(tokens / statistics.median(seconds), 1),
        "peak_gib": peak and round(peak / 2**30, 2),
    }


def difference(actual: Any, expected: Any) -> float:
    """Returns the largest relative L2 difference of two trees of arrays."""
    import jax

    from gemma_jax.testing import relative_difference

    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(relative_difference(a, b)) for a, b in pairs)


def attention(tiny: bool, heads: int, kv_heads: int, head_dim: int, length: int) -> Result:
    """The kernel in bfloat16 beside the reference in float32, value and gradients of packed rows."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gemma_jax.config import MeshConfig
    from gemma_jax.model.attention import attend, attention_mask
    from gemma_jax.model.triton import triton_attend
    from gemma_jax.sharding import make_mesh

    device_of()
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    length = 128 if tiny else length
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
    positions = np.broadcast_to(np.arange(length), (2, length))
    mask = attention_mask(positions, segments, positions, segments)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, head_dim))) for n in (heads, kv_heads, kv_heads))
    q, k, v = (x.astype(jnp.float32 if tiny else jnp.bfloat16) for x in (q * head_dim**-0.5, k, v))

    def kernel(*x: Any) -> Any:
        return triton_attend(*x, segments, mesh, residuals="attended", interpret=tiny)

    def value_and_gradients(function: Callable[..., Any], *x: Any) -> Any:
        loss = lambda *x: jnp.sum(function(*x).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.jit(function)(*x), jax.jit(jax.grad(loss, (0, 1, 2)))(*x)

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = value_and_gradients(lambda *x: attend(*x, mask), *wide)
    found = difference(value_and_gradients(kernel, q, k, v), expected)
    assert found < 2e-2, f"the kernel differs from the reference by {found:.2g}"
    return {"largest_difference": found}


def equals_cpu(tiny: bool) -> Result:
    """Five steps of training a tiny model, and greedy sampling, in float32 on the device and on CPU."""
    import jax
    import numpy as np

    from gemma_jax.config import PRESETS, ComputeConfig, MeshConfig
    from gemma_jax.model import ModelSpec
    from gemma_jax.sampling.generate import Generator
    from gemma_jax.sharding import make_mesh

    device_of()
    losses, texts = [], []
    for devices in (jax.devices()[:1], jax.devices("cpu")[:1]):
        mesh = make_mesh(MeshConfig(), devices)
        step, _ = training_step(mesh, "gemma_tiny", 64, 4, {"compute.dtype": "float32"})
        losses.append([step() for _ in range(5)])
        spec = ModelSpec(PRESETS["gemma_tiny"], ComputeConfig(dtype="float32"), mesh)
        texts.append(decoded(Generator(spec, spec.init(0)), 4, 16, 32))
    found = float(np.max(np.abs(np.subtract(*losses)) / np.abs(losses[1])))
    assert found < 1e-4, f"losses differ by {found:.2g}: {losses}"
    same = float(np.mean([a == b for a, b in zip(*texts, strict=True)]))
    assert same == 1, f"{same:.0%} of the texts are equal"
    return {"largest_difference": found}


def training_step(
    mesh: Any, preset: str, length: int, rows: int, changes: Result, quantization: str = ""
) -> tuple[Callable[[], float], Any]:
    """Returns a function that trains one step on random tokens for its loss, and the planned bytes."""
    import numpy as np

    from gemma_jax.config import PRESETS, ExampleDataConfig, FinetuneConfig, replace
    from gemma_jax.data.packing import Batch
    from gemma_jax.sharding import put_batch
    from gemma_jax.training.finetuning import finetuning
    from gemma_jax.training.objectives import pretraining
    from gemma_jax.training.state import create_train_state
    from gemma_jax.training.step import make_train_step
    from gemma_jax.weights import kind_of

    data = ExampleDataConfig(sequence_length=length, batch_size=rows)
    config = replace(FinetuneConfig(model=PRESETS[preset], data=data), changes)
    recipe = pretraining(config, mesh)
    if config.lora.rank:
        recipe = finetuning(config, mesh, kind_of(quantization), length, 1)
    state, step = create_train_state(recipe), make_train_step(recipe)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), ones.astype(np.float32), positions, ones)
    on_mesh = put_batch(batch, rows, mesh)
    # The program itself refuses arrays of int4, so it is compiled once more, or found in the cache.
    memory = step.lower(state, on_mesh).compile().memory_analysis()
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes
    planned += memory.temp_size_in_bytes - memory.alias_size_in_bytes

    def run() -> float:
        nonlocal state
        state, metrics = step(state, on_mesh)
        return float(metrics["loss"])

    return run, planned


def train(tiny: bool, preset: str, length: int, rows: int, changes: Result, quantization: str = "") -> Result:
    """The speed of training, and its memory beside what the compiler says."""
    from gemma_jax.config import PRESETS, MeshConfig
    from gemma_jax.sharding import make_mesh
    from gemma_jax.training.hardware import peak_flops, training_flops_a_token

    if tiny:
        preset, length, rows = "gemma_tiny", 32, 2
        changes = changes | {"model.embed_dim": 64, "model.hidden_dim": 128}
    device = device_of()
    step, planned = training_step(make_mesh(MeshConfig()), preset, length, rows, changes, quantization)
    seconds = timed(step, 2 if tiny else 8)
    found = figures(seconds, rows * length)
    flops = training_flops_a_token(PRESETS[preset], length, frozen="lora.rank" in changes)
    if peak := peak_flops([device]):
        found["utilisation"] = round(flops * found["tokens_per_second"] / peak, 3)
    return found | {"planned_gib": round(planned / 2**30, 2)}


def timed(step: Callable[[], Any], count: int) -> list[float]:
    """Runs a step twice, and then `count` times; returns the seconds of those."""
    seconds = []
    for _ in range(count + 2):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def decoded(generator: Any, batch: int, prompt: int, new: int) -> list[list[int]]:
    """Returns the new tokens of random prompts, chosen greedily."""
    import numpy as np

    from gemma_jax.config import SamplingConfig
    from gemma_jax.sampling import Completion, complete_requests
    from gemma_jax.sampling.requests import requests_of

    rng = np.random.default_rng(0)
    prompts = [[2, *rng.integers(3, 200, prompt - 1).tolist()] for _ in range(batch)]
    requests = requests_of(prompts, SamplingConfig(max_new_tokens=new), [])
    completions = [Completion() for _ in requests]
    for _ in complete_requests(generator, requests, completions):
        pass
    return [completion.token_ids for completion in completions]


def decode(tiny: bool, preset: str, kind: str, batches: list[int]) -> Iterator[Result]:
    """New tokens a second: the time of 128 of them after a prompt of 128, less that of one."""
    from gemma_jax.api import Gemma

    device_of()
    prompt, new = (16, 8) if tiny else (128, 128)
    how = {"dtype": "bfloat16"} if kind == "bfloat16" else {"quantization": kind}
    gemma = Gemma.from_pretrained("random:gemma_tiny" if tiny else f"random:{preset}", **how)
    for batch in batches:
        run = functools.partial(decoded, gemma._generator, batch, prompt)
        whole, first = timed(lambda: run(new), 3), timed(lambda: run(1), 3)  # noqa: B023
        found = figures([a - min(first) for a in whole], batch * (new - 1))
        yield {"batch": batch, "prefill_seconds": round(statistics.median(first), 3)} | found


def transformers_model(preset: str, tiny: bool) -> Any:
    """Returns a GemmaForCausalLM with random weights in bfloat16, on the GPU."""
    import torch
    from transformers import GemmaForCausalLM

    kind = torch.float32 if tiny else torch.bfloat16
    with torch.device("cpu" if tiny else "cuda"):
        torch.set_default_dtype(kind)
        return GemmaForCausalLM(transformers_config(preset))


def transformers_config(preset: str) -> Any:
    """Returns the GemmaConfig of a preset."""
    from transformers import GemmaConfig

    from gemma_jax.config import PRESETS

    shape = PRESETS[preset]
    return GemmaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_length,
    )


def of_torch(seconds: list[float], tokens: int) -> Result:
    """Returns the median speed and the peak memory of torch."""
    import torch

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    speed = round(tokens / statistics.median(seconds), 1)
    return {"tokens_per_second": speed, "peak_gib": peak and round(peak / 2**30, 2)}


def transformers_decode(tiny: bool, preset: str, batches: list[int]) -> Iterator[Result]:
    """What `decode` measures, with transformers."""
    if is_missing("transformers"):
        yield {"skipped": "transformers is not installed"}
        return
    import torch

    preset, prompt, new = ("gemma_tiny", 16, 8) if tiny else (preset, 128, 128)
    model = transformers_model(preset, tiny).eval()

    def run(ids: Any, count: int) -> None:
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    for batch in batches:
        one = functools.partial(run, torch.randint(3, 200, (batch, prompt), device=model.device))
        whole, first = timed(lambda: one(new), 3), timed(lambda: one(1), 3)  # noqa: B023
        yield {"batch": batch} | of_torch([a - min(first) for a in whole], batch * (new - 1))


def peft_train(tiny: bool, preset: str, length: int, rows: int, rank: int) -> Result:
    """What `train` measures with adapters, with PEFT and rematerialised layers."""
    if is_missing("peft") or is_missing("transformers"):
        return {"skipped": "peft or transformers is not installed"}
    import torch
    from peft import LoraConfig, get_peft_model

    preset, length, rows = ("gemma_tiny", 32, 2) if tiny else (preset, length, rows)
    model = get_peft_model(
        transformers_model(preset, tiny), LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    )
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=not tiny)
    ids = torch.randint(3, 200, (rows, length), device=trained[0].device)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return of_torch(timed(step, 2 if tiny else 8), rows * length)


def vllm_decode(tiny: bool, preset: str, batches: list[int]) -> Iterator[Result]:
    """What `decode` measures, with vLLM."""
    if is_missing("vllm"):
        yield {"skipped": "vllm is not installed"}
        return
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        config = transformers_config("gemma_tiny" if tiny else preset)
        config.architectures, config.torch_dtype = ["GemmaForCausalLM"], "bfloat16"
        config.save_pretrained(folder)
        model = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=512)

        def run(batch: int, count: int) -> None:
            # Different first tokens, so that no prompt shares what is cached of another.
            prompts = [{"prompt_token_ids": [3 + row, *range(3, 130)]} for row in range(batch)]
            settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            model.generate(prompts, settings, use_tqdm=False)

        for batch in batches:
            one = functools.partial(run, batch)
            whole, first = timed(lambda: one(128), 3), timed(lambda: one(1), 3)  # noqa: B023
            speed = batch * 127 / (statistics.median(whole) - min(first))
            yield {"batch": batch, "tokens_per_second": round(speed, 1)}


CASES: dict[str, Callable[..., Result | Iterator[Result]]] = {
    function.__name__: function
    for function in (attention, equals_cpu, train, decode, transformers_decode, peft_train, vllm_decode)
}
BLOCKS = {"compute.loss_vocab_block": 16_000}
ADAPTERS = {"lora.rank": 16, "compute.param_dtype": "bfloat16", **BLOCKS}
BATCHES = (1, 16, 64)


def training_case(preset: str, length: int, rows: int, changes: Result, quantization: str = "") -> Any:
    """Returns a case of `train`."""
    arguments = {"preset": preset, "length": length, "rows": rows, "changes": changes}
    return "train", arguments | ({"quantization": quantization} if quantization else {})


PARTS: dict[str, list[tuple[str, Result]]] = {
    "tests": [
        *(
            ("attention", {"heads": n, "kv_heads": k, "head_dim": h, "length": length})
            for n, k, h, length in (
                (8, 1, 256, 2048),
                (16, 16, 256, 1000),
                (8, 2, 128, 2048),
                (4, 4, 64, 333),
            )
        ),
        ("equals_cpu", {}),
    ],
    "train": [
        training_case("gemma_2b", 2048, 4, {"compute.remat": "attention", **BLOCKS}),
        training_case("gemma_2b", 8192, 1, {"compute.remat": "attention", **BLOCKS}),
        training_case("gemma_2b", 2048, 4, {"compute.remat": "attention", **ADAPTERS}),
        training_case("gemma_7b", 2048, 1, {"compute.remat": "full", **ADAPTERS}, "nf4"),
    ],
    **{
        f"decode-{size}": [
            ("decode", {"preset": f"gemma_{size}", "kind": kind, "batches": BATCHES})
            for kind in ("bfloat16", "int8", "int4")
        ]
        for size in ("2b", "7b")
    },
    "peers": [
        ("transformers_decode", {"preset": "gemma_2b", "batches": BATCHES}),
        ("peft_train", {"preset": "gemma_2b", "length": 2048, "rows": 4, "rank": 16}),
        ("vllm_decode", {"preset": "gemma_2b", "batches": BATCHES}),
    ],
}


def merge(out: Path) -> None:
    """Writes the results of the parts that were run between the marks of docs/gpu.md; draws the picture."""
    results = [one for part in PARTS for one in read(out / f"{part}.json")]
    if not results:
        sys.exit(f"error: {out} has no results; run the other parts first.")
    device = next((one["device"] for one in results if "device" in one), "an unknown device")
    version = next((one["jax"] for one in results if "jax" in one), "?")
    lines = [f"On {device}, jax {version}, by `make gpu`:", ""]
    if any("tiny" in one for one in results):
        device = "a tiny model (--tiny)"
        lines = ["Of a tiny model on CPU, to check the script: not a measurement.", ""]
    lines += ["| case | tokens/s | utilisation | peak GiB | planned GiB |", "|---|---|---|---|---|"]
    for one in results:
        said = one.get("error") or one.get("skipped")
        if "largest_difference" in one:
            said = f"relative difference {one['largest_difference']:.1e}"
        keys = ("tokens_per_second", "utilisation", "peak_gib", "planned_gib")
        cells = [said, "", "", ""] if said else ["" if one.get(key) is None else one[key] for key in keys]
        lines.append(f"| {title(one)} | " + " | ".join(map(str, cells)) + " |")
    marks = "<!-- measured -->", "<!-- end of measured -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(marks[0])
    if is_missing("matplotlib"):
        print("there is no picture, because matplotlib is not installed", file=sys.stderr)
    else:
        draw([one for one in results if "decode" in one["case"] and "tokens_per_second" in one], device)
        lines += ["", "![Decoding](gpu.png)"]
    page = "\n".join([marks[0], *lines, marks[1]])
    PAGE.write_text(f"{before}{page}{rest.partition(marks[1])[2]}", encoding="utf-8")


def read(path: Path) -> list[Result]:
    """Returns the results of a part, or none if it was not run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def title(one: Result) -> str:
    """Returns what a case is, for people."""
    keys = ("preset", "kind", "quantization", "length", "rows", "batch", "heads", "kv_heads", "head_dim")
    parts = [
        f"{key} {one[key]}" if isinstance(one[key], int) else str(one[key]) for key in keys if key in one
    ]
    adapters = "LoRA" if "lora.rank" in one.get("changes", {}) else ""
    return ", ".join([one["case"].replace("_", " "), *filter(None, [adapters]), *parts])


def draw(results: list[Result], device: str) -> None:
    """Draws tokens a second by the size of the batch, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    presets = sorted({one["preset"] for one in results})
    figure, panels = pyplot.subplots(
        1, max(len(presets), 1), figsize=(5 * max(len(presets), 1), 4), squeeze=False
    )
    for panel, preset in zip(panels[0], presets, strict=False):
        lines: dict[str, list[tuple[int, float]]] = {}
        for one in results:
            if one["preset"] == preset:
                name = one.get("kind") or one["case"].removesuffix("_decode")
                lines.setdefault(name, []).append((one["batch"], one["tokens_per_second"]))
        for name, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="rows", ylabel="tokens a second", title=preset)
        panel.set_xticks(BATCHES, [str(n) for n in BATCHES])
        panel.legend()
    figure.suptitle(f"Decoding on {device}, 128 tokens after 128")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
