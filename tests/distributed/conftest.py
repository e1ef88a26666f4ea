"""The comparison table that the harness prints."""

from typing import Any

import pytest

_ROWS: list[tuple[str, float, float, float]] = []


@pytest.fixture
def comparison() -> list[tuple[str, float, float, float]]:
    """Layout, and relative differences of loss, metrics (largest) and gradients (largest) from the plain run."""
    return _ROWS


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (handed_over := vars(session.config).get("workeroutput")) is not None:
        handed_over["layouts"] = _ROWS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    _ROWS.extend(tuple(row) for row in vars(node).get("workeroutput", {}).get("layouts", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    terminalreporter.section("relative difference from the plain run")
    terminalreporter.write_line(f"{'layout':38} {'loss':>9} {'metrics':>9} {'gradients':>9}")
    for name, loss, metrics, gradients in _ROWS:
        terminalreporter.write_line(f"{name:38} {loss:9.1e} {metrics:9.1e} {gradients:9.1e}")
