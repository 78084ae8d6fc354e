"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedattn")
    group.addoption("--full-grid", action="store_true", help="every case, not the quick subset")
    group.addoption("--compile", action="store_true", help="also torch.compile and FlexAttention")
