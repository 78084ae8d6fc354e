"""Every Python block of the README and docs/ and every example in a docstring runs by itself."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator

import pytest
import torch
from processes import ROOT, SHIPPED

PAGES = {
    str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
}
BLOCKS = {
    (page, text[: found.start(1)].count("\n")): found[1]
    for page, text in PAGES.items()
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
}


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("place", BLOCKS, ids=lambda place: f"{place[0]} line {place[1] + 1}")
def test_readme(place: tuple[str, int]) -> None:
    page, line = place
    code = "\n" * line + BLOCKS[place]  # so that an error names the page's line
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def modules_with_examples() -> list[str]:
    """By a look at their sources: importing them all would import every peer of the benchmarks."""
    found = []
    for package, folder in SHIPPED.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                name = ".".join((package.replace("/", "."), *parts))
                found.append(name.removesuffix(".__init__"))
    return found


def test_there_are_examples() -> None:
    assert "fusedattn" in modules_with_examples()
    assert len(BLOCKS) == sum(text.count("```python") for text in PAGES.values())


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, name, globs={}):
        runner.run(test)
    assert runner.failures == 0
    assert runner.tries > 0
