"""Tests of how a few cases of a test are taken (``conftest.py``)."""

from __future__ import annotations

from types import SimpleNamespace

import conftest
import pytest


class Item:
    def __init__(self, nodeid: str, few: int | None):
        self.nodeid, self._few = nodeid, few

    def get_closest_marker(self, name: str):
        assert name == "few"
        return None if self._few is None else SimpleNamespace(args=(self._few,))


@pytest.mark.parametrize(
    ("thorough", "few", "kept"), [(False, 3, [0, 3, 6]), (False, 1, [0]), (False, 9, range(7)), (True, 3, range(7))]
)
def test_first_last_and_some_between(monkeypatch, thorough, few, kept):
    """Of each test by itself; what has no mark is kept."""
    monkeypatch.setattr(conftest, "_thorough", thorough)
    marked = [[Item(f"{test}[{i}]", few) for i in range(7)] for test in ("a.py::test_x", "b.py::test_x")]
    others = [Item(f"a.py::test_y[{i}]", None) for i in range(3)]
    items, left_out = [*others, *marked[0], *marked[1]], []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert items == others + [cases[i] for cases in marked for i in kept]
    assert len(left_out) == 17 - len(items) and not set(left_out) & set(items)
