"""The house of docs/architecture.md: who may import whom, read from the page itself.

All imports are looked at: those inside functions and those for type checkers too.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
BELOW = {"foundation": -2, "ground": -1}


def read_floors(text: str) -> dict[str, int]:
    """Floor of every path in the fenced block that begins with ```floors; those with a name are below 0."""
    blocks = re.findall(r"^```floors\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{len(blocks)} blocks ```floors"
    floors: dict[str, int] = {}
    for line in filter(None, map(str.strip, blocks[0].splitlines())):
        number, *paths = line.split()
        assert paths, f"no path on floor {number}"
        for path in paths:
            assert path not in floors, f"{path} is on two floors"
            floors[path] = BELOW[number] if number in BELOW else int(number)
    return floors


def rooms_of(file: str, floors: dict[str, int]) -> list[str]:
    """The paths of the block that a file, named from the root, is under: one, in a house in order."""
    return [room for room in floors if file == room or (room.endswith("/") and file.startswith(room))]


def imported_names(source: str, file: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports; `from a import b` gives a.b."""
    package = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def module_file(name: str, files: set[str]) -> str | None:
    """The file among `files` that importing a dotted name executes last: gemma_jax.api.Gemma is in api.py."""
    parts = name.split(".")
    while parts:
        path = "/".join(parts)
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in files:
                return file
        parts.pop()
    return None


def python_files(root: Path, folder: str) -> dict[str, str]:
    """Text of every Python file under a folder, by its path from the root."""
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((root / folder).rglob("*.py"))
    }


def floor_violations(sources: dict[str, str], floors: dict[str, int]) -> list[str]:
    """A sentence for every file that is on no floor and every import that the floors forbid."""
    wrong = []
    for file, source in sources.items():
        rooms = rooms_of(file, floors)
        if len(rooms) != 1:
            wrong.append(f"{file} is in {rooms or 'no room'}")
            continue
        for line, name in imported_names(source, file):
            target = module_file(name, set(sources))
            if target is None:
                continue
            for room in rooms_of(target, floors):
                if room != rooms[0] and floors[room] >= floors[rooms[0]]:
                    wrong.append(f"{file}:{line} imports {name}, which is on floor {floors[room]}")
    return wrong


def import_cycles(sources: dict[str, str]) -> list[list[str]]:
    """Cycles of files that import each other, anywhere in their code."""
    graph = {
        file: {module_file(name, set(sources)) for _, name in imported_names(source, file)} - {None, file}
        for file, source in sources.items()
    }
    cycles, state = [], dict.fromkeys(graph, "new")

    def visit(file: str, path: list[str]) -> None:
        state[file] = "open"
        for target in sorted(filter(None, graph[file])):
            if state[target] == "open":
                cycles.append([*path[path.index(target) :], target])
            elif state[target] == "new":
                visit(target, [*path, target])
        state[file] = "done"

    for file in graph:
        if state[file] == "new":
            visit(file, [file])
    return cycles


FLOORS = read_floors(TEXT)
PACKAGE = python_files(ROOT, "gemma_jax")
SCRIPTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "sample.py", "setup.py")}
CONFIGS = python_files(ROOT, "configs")
EVERYTHING = PACKAGE | SCRIPTS | CONFIGS | python_files(ROOT, "tests")


def test_every_file_imports_from_its_own_package_and_from_lower_floors_only() -> None:
    assert floor_violations(PACKAGE, FLOORS) == []


def test_every_room_of_the_page_is_there() -> None:
    empty = [room for room in FLOORS if not any(rooms_of(file, {room: 0}) for file in PACKAGE)]
    assert empty == [], "docs/architecture.md names rooms that do not exist"


def test_there_is_no_import_cycle() -> None:
    assert import_cycles(PACKAGE) == []


def test_scripts_stand_on_the_command_line_alone() -> None:
    for script in ("train.py", "sample.py"):
        names = {name for _, name in imported_names(SCRIPTS[script], script)}
        assert names in ({"sys", "gemma_jax.cli.main"}, {"sys", "gemma_jax.cli.run_command"}), script


def test_configs_import_the_config_package_alone() -> None:
    for file, source in CONFIGS.items():
        names = {name.rpartition(".")[0] for _, name in imported_names(source, file)}
        assert names == {"gemma_jax.config"}, file


def test_config_needs_nothing_but_the_standard_library() -> None:
    """Help and mistakes are told at once because of this; so must the command line be, and the errors."""
    for file, source in PACKAGE.items():
        if file.startswith("gemma_jax/config/") or file in ("gemma_jax/cli.py", "gemma_jax/errors.py"):
            for line, name in imported_names(source, file):
                first, second = (name.split(".") + [""])[:2]
                own = first == "gemma_jax" and second in ("config", "errors")
                assert own or first in sys.stdlib_module_names, f"{file}:{line} imports {name}"


def test_tensorflow_and_torch_are_imported_nowhere() -> None:
    """But for torch where transformers, which speaks in its tensors, is compared with."""
    beside_transformers = {"gemma_jax/verification.py", "tests/golden/make.py", "tests/test_parity.py"}
    beside_transformers |= {"tests/pretrained/test_transformers.py"}
    for file, source in EVERYTHING.items():
        for line, name in imported_names(source, file):
            package = name.split(".")[0]
            assert package not in ("tensorflow", "tf"), f"{file}:{line} imports {name}"
            assert package != "torch" or file in beside_transformers, f"{file}:{line} imports {name}"


def test_modules_are_imported_by_their_names() -> None:
    """A computed import would escape this test: that of a command, and of packages that may be missing."""
    for file, source in PACKAGE.items():
        if file not in ("gemma_jax/cli.py", "gemma_jax/training/sinks.py"):
            assert not re.search(r"\bimport_module\(|\b__import__\(", source), file


def test_files_are_short_and_named_after_what_they_hold() -> None:
    for file, source in EVERYTHING.items():
        assert len(source.splitlines()) <= 420, file
        assert not re.search(r"(^|[_/])(utils?|common|helpers?|misc)(_|\.py$|/)", file), file


# The tests of this file's own functions, on a house with every fault.

HOUSE = """
```floors
ground  pkg/errors.py
0       pkg/low/  pkg/flat.py
1       pkg/high/
1       pkg/other.py
```
"""


def test_the_block_is_read() -> None:
    assert read_floors(HOUSE) == {
        "pkg/errors.py": -1,
        "pkg/low/": 0,
        "pkg/flat.py": 0,
        "pkg/high/": 1,
        "pkg/other.py": 1,
    }
    for text in (
        "",
        HOUSE + HOUSE,
        HOUSE.replace("pkg/other.py", "pkg/low/"),
        HOUSE.replace("pkg/high/", ""),
    ):
        with pytest.raises(AssertionError):
            read_floors(text)


GOOD = {
    "pkg/errors.py": "import os",
    "pkg/flat.py": "from pkg.errors import E",
    "pkg/low/__init__.py": "from pkg.low.a import x",
    "pkg/low/a.py": "import pkg.low.b",
    "pkg/low/b.py": "",
    "pkg/high/c.py": "from pkg import flat\nfrom pkg.low import x",
    "pkg/other.py": "import pkg.low.a as a",
}
FAULTS = {
    "upwards": ("pkg/flat.py", "import pkg.high.c", "pkg/flat.py:1 imports pkg.high.c"),
    "upwards, by name": ("pkg/flat.py", "from pkg.high.c import f", "pkg/flat.py:1 imports pkg.high.c.f"),
    "upwards, as a module": ("pkg/flat.py", "from pkg import other", "pkg/flat.py:1 imports pkg.other"),
    "upwards, relative": ("pkg/low/a.py", "from ..high import c", "pkg/low/a.py:1 imports pkg.high.c"),
    "sideways": ("pkg/flat.py", "import pkg.low.b", "pkg/flat.py:1 imports pkg.low.b"),
    "in a function": ("pkg/other.py", "def f():\n  import pkg.high.c", "pkg/other.py:2 imports pkg.high.c"),
    "for types": (
        "pkg/flat.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from pkg.low.a import A",
        "pkg/flat.py:3 imports pkg.low.a.A",
    ),
    "homeless": ("pkg/new.py", "", "pkg/new.py is in no room"),
}


def test_a_house_in_order_has_no_fault() -> None:
    assert floor_violations(GOOD, read_floors(HOUSE)) == []
    assert import_cycles(GOOD) == []


@pytest.mark.parametrize(("file", "source", "told"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_found(file: str, source: str, told: str) -> None:
    found = floor_violations(GOOD | {file: source}, read_floors(HOUSE))
    assert len(found) == 1 and found[0].startswith(told)


@pytest.mark.parametrize(
    "source", ["import pkg.low.a", "from .a import y", "def f():\n  from pkg.low import x"]
)
def test_cycles_are_found(source: str) -> None:
    (cycle,) = import_cycles(GOOD | {"pkg/low/b.py": source})
    assert "pkg/low/b.py" in cycle and cycle[0] == cycle[-1]
