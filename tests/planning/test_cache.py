"""Analyses of programs are restored unchanged from the cache; other files in its folder are skipped."""

from pathlib import Path

import pytest

from gemma_jax.planning.analysis import Analysis, Cost, Kernel
from gemma_jax.planning.cache import Entry, PlanCache, key_of
from gemma_jax.planning.collectives import Collective

ENTRY = Entry(
    Analysis(
        {"parameters": 7, "temporaries": 3},
        123,
        23,
        1,
        (Kernel("splash", True, 18, 1e12),),
        (Collective("all-gather", "fsdp", ("bf16[8,4]",), 18, 1.5, "a.py:1 < b.py:2", "jit(step)"),),
        (Cost("jit(step)/dot", "a.py:1", 100),),
    )
)


@pytest.mark.parametrize("entry", [ENTRY, Entry(None, 21, 16), Entry(None)])
def test_round_trip(tmp_path: Path, entry: Entry) -> None:
    cache = PlanCache(tmp_path / "plans")
    assert cache.get("a") is None
    cache.put("a", entry)
    assert cache.get("a") == entry
    assert [path.suffix for path in (tmp_path / "plans").iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"analysis": {}}', '{"analysis": 3}'])
def test_what_is_no_entry_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert PlanCache(tmp_path).get("a") is None


def test_everything_that_decides_a_program_decides_its_key() -> None:
    keys = {
        key_of(*identity)
        for identity in [
            ("text", "v5e:4x4", {}, "libtpu 1"),
            ("other", "v5e:4x4", {}, "libtpu 1"),
            ("text", "v5e:4x8", {}, "libtpu 1"),
            ("text", "v5e:4x4", {"a": "1"}, "libtpu 1"),
            ("text", "v5e:4x4", {"a": "2"}, "libtpu 1"),
            ("text", "v5e:4x4", {}, "libtpu 2"),
        ]
    }
    assert len(keys) == 6
    assert key_of("t", "v", {"a": "1", "b": "2"}, "l") == key_of("t", "v", {"b": "2", "a": "1"}, "l")
