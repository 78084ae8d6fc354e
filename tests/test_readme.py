"""Every Python block of the README and every example in a docstring runs, each by itself."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator

import pytest
import torch
from processes import ROOT, SHIPPED

README = (ROOT / "README.md").read_text()
BLOCKS = {
    README[: found.start(1)].count("\n"): found[1]
    for found in re.finditer(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
}


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("line", BLOCKS, ids=lambda line: f"line {line + 1}")
def test_readme(line: int) -> None:
    code = "\n" * line + BLOCKS[line]  # so that an error names the README's line
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


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
    assert len(BLOCKS) == README.count("```python")


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, name, globs={}):
        runner.run(test)
    assert runner.failures == 0
    assert runner.tries > 0
