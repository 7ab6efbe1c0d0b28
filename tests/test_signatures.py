"""Public signatures say what they take: those that do not are counted, and grow no more."""

from __future__ import annotations

from tests.any_count import ROOT, loose

LOOSE = 18
"""Parameters and returns of public functions that are `Any`. Whoever gives one a type lowers the number."""


def test_public_signatures_have_types():
    found = list(loose(ROOT / "opd"))
    assert len(found) <= LOOSE, "python -m tests.any_count lists them; give the new ones a type"
    assert len(found) == LOOSE, f"{len(found)} are left: lower LOOSE to that"


def test_what_counts_as_loose(tmp_path):
    (tmp_path / "file.py").write_text(
        "def f(a: Any, b: list[Any], c: dict[str, Any], d: int) -> Any | None: ...\n"
        "def _private(a: Any): ...\n"
        "class C:\n    def __call__(self, a: Any): ...\n    def __eq__(self, a: Any): ...\n"
    )
    assert [line.split(" ", 1)[1] for line in loose(tmp_path)] == ["f a", "f b", "f return", "__call__ a"]
