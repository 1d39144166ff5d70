"""Who may import whom. The floors of the package are in pyproject.toml, where import-linter reads them."""

import ast
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]


def imported_modules(file: Path) -> set[str]:
    """Returns the names of all modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


def test_a_file_imports_from_its_own_package_and_from_lower_floors_only() -> None:
    assert lint_imports(str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_scripts_call_the_command_line_and_configs_need_the_config_package_alone() -> None:
    for script in ("train.py", "sample.py"):
        assert imported_modules(ROOT / script) == {"sys", "gemma_jax.cli"}, script
    for file in (ROOT / "configs").glob("*.py"):
        assert imported_modules(file) - {"pathlib"} == {"gemma_jax.config"}, file


def test_files_are_short_and_named_after_what_they_hold() -> None:
    for file in [*(ROOT / "gemma_jax").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 420, file
        assert file.stem not in ("util", "utils", "common", "helper", "helpers", "misc"), file
