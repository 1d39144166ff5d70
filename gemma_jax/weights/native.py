"""Products of few rows on one CPU device, in C++ (native.cc) that XLA calls through `jax.ffi`.

The library is compiled at its first use by the C++ compiler of the machine, and kept in the user's cache.
Without a compiler everything is computed by XLA, which is slower, and one line on stderr says why.

Shape legend: R rows of activations, C contracted axes, O output axes, K elements of a block, G blocks, V
rows of a table, D embed.
"""

import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import platform as machine
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_jax.sharding import platform

PREFIX = "gemma"  # of the functions' names, as XLA knows them
# Rows of activations up to which products are native. Milliseconds for [2048, 16384] on one busy core, here
# and by XLA, with 64 rows: float32 130 and 165, bfloat16 75 and 130, int8 59 and 138, int4 70 and 136; with
# 128 rows: 243 and 198, 187 and 214, 102 and 240, 130 and 221. With 8 rows they are 7 to 18 times as fast.
MOST_ROWS = 64

_SOURCE = Path(__file__).with_name("native.cc")
_FOLDER = Path("~/.cache/gemma_jax/native")
_COMPILERS = ("c++", "g++", "clang++")
_FUNCTIONS = ("dense", "integers", "dense_table", "integer_table")
_VECTOR_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_COMPILE_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How products of few rows are computed on CPU."""

    name: str  # avx2, plain (C++ without vector instructions of its own) or xla
    reason: str = ""  # why it is xla

    def __str__(self) -> str:
        """Returns the name, and the reason if there is one."""
        return f"{self.name} ({self.reason})" if self.reason else self.name


@functools.cache
def kernels() -> Kernels:
    """Loads the library, which is compiled first if it is not in the cache, and reports what can be used."""
    flags = vector_flags()
    try:
        register(compiled(flags), PREFIX)
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        # The last line of a compiler's output says what the error is, or counts the errors.
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Kernels("xla", next((line for line in output if "error" in line), output[-1]))
    return Kernels("avx2" if flags else "plain")


def vector_flags() -> tuple[str, ...]:
    """Returns the compiler's flags for AVX2 if this machine has it, otherwise none."""
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ()
    x86 = machine.machine() in ("x86_64", "AMD64")
    return _VECTOR_FLAGS if x86 and {"avx2", "fma", "f16c"} <= features else ()


def compiled(flags: Sequence[str]) -> Path:
    """Returns the compiled library, which is made if it is not in the cache.

    Several processes may do this at once, because a library is complete before it has its name.

    Raises:
      OSError: There is no compiler, or the cache cannot be written.
      subprocess.SubprocessError: The compiler fails.
    """
    command = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, _COMPILERS), "")]
    if not shutil.which(command[0]):
        raise OSError(
            f"the compiler of CXX, {command[0]}, is not found"
            if command[0]
            else f"there is no C++ compiler: none of {', '.join(_COMPILERS)} is found"
        )
    command += [
        "-std=c++17",
        "-O3",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-w",
        *flags,
        "-isystem",
        jax.ffi.include_dir(),
    ]
    identity = [_SOURCE.read_text(), *command, jax.__version__, machine.machine()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    folder = _FOLDER.expanduser()
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"compiling {_SOURCE.name} for faster sampling on CPU, once", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / library.name
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(made)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
            )
            made.replace(library)
    return library


def register(library: Path, prefix: str) -> None:
    """Tells XLA the functions of a compiled library as PREFIX_FUNCTION."""
    functions = ctypes.CDLL(str(library))
    for name in _FUNCTIONS:
        function = jax.ffi.pycapsule(getattr(functions, f"gemma_{name}"))
        jax.ffi.register_ffi_target(f"{prefix}_{name}", function, platform="cpu")


@functools.cache
def _available() -> bool:
    found = kernels()
    if found.reason:
        print(f"sampling on CPU is slower than it could be: {found.reason}", file=sys.stderr)
    return not found.reason


def usable(x: jax.Array, inputs: int, mesh: Mesh) -> bool:
    """Whether products with x may be native: few rows of float32 activations, on one CPU device.

    Args:
      x: [..., *C] activations.
      inputs: The number of axes in C.
      mesh: The mesh of the weight.
    """
    rows = math.prod(x.shape[: x.ndim - inputs])
    here = mesh.size == 1 and platform(mesh) == "cpu"
    return here and x.dtype == jnp.float32 and 0 < rows <= MOST_ROWS and _available()


def _call(function: str, x: jax.Array, outputs: int, *arrays: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((len(x), outputs), jnp.float32)
    out: jax.Array = jax.ffi.ffi_call(f"{PREFIX}_{function}", result)(x, *arrays)
    return out


def matmul(x: jax.Array, array: jax.Array, layer: jax.Array) -> jax.Array | None:
    """Multiplies by one layer of a dense weight.

    Args:
      x: [R, C] float32 activations.
      array: [layers, *C, *O] float32, bfloat16 or float16.
      layer: int32 [].

    Returns:
      [R, O] float32, or None for another dtype.
    """
    if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return None
    matrix = array.reshape(len(array), x.shape[1], -1)
    return _call("dense", x, matrix.shape[2], matrix, layer)


def integer_matmul(x: jax.Array, codes: jax.Array, scale: jax.Array, layer: jax.Array) -> jax.Array | None:
    """Multiplies by one layer of integers with scales.

    The activations are rounded to integers with one scale for each part of a row: beside int8 codes to 16
    bits in parts of 256, beside int4 codes to 8 bits in parts of 32. Parts of smaller blocks are smaller.

    Args:
      x: [R, C] float32 activations; element c is number c % K of block c / K.
      codes: [layers, K, G, O] int8 or int4, or [layers, 1, C, O] with one scale for each output.
      scale: [layers, G, O] or [layers, 1, O], float32 or bfloat16.
      layer: int32 [].

    Returns:
      [R, O] float32, or None if blocks are not multiples of 4, or a layer of int4 does not begin at a byte.
    """
    in_blocks = scale.shape[1] == codes.shape[2]
    if (in_blocks and codes.shape[1] % 4) or math.prod(codes.shape[1:]) % 2:
        return None
    return _call("integers", x, codes.shape[-1], codes, scale, layer)


def unembed(x: jax.Array, table: jax.Array) -> jax.Array | None:
    """[R, D] float32 times the transposed table [V, D] -> [R, V] float32, or None as for `matmul`."""
    if table.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return None
    return _call("dense_table", x, len(table), table)


def integer_unembed(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array | None:
    """`unembed` of a table of int8 [V, D] with a scale for each row, [V, 1] float32.

    The activations are rounded to 16 bits in parts of 1,024. Returns None for another dtype.
    """
    if codes.dtype != jnp.int8 or scale.dtype != jnp.float32:
        return None
    return _call("integer_table", x, len(codes), codes, scale)
