"""The planted wrong lines can be planted: what mutants.py would say only after an hour."""

from __future__ import annotations

from mutants import MUTANTS, Mutant
from processes import ROOT


def _fits(mutant: Mutant) -> bool:
    """Its line stands once, and there are the tests that shall catch it."""

    def there(test: str) -> bool:
        file, *names = test.split("::")
        text = (ROOT / file).read_text()
        return all(f"def {name.split('[')[0]}(" in text for name in names)

    once = (ROOT / mutant.file).read_text().count(mutant.old) == 1
    return once and bool(mutant.tests) and all(map(there, mutant.tests))


def test_each_can_be_planted() -> None:
    assert [str(mutant) for mutant in MUTANTS if not _fits(mutant)] == []
