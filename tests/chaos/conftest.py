from collections.abc import Iterable

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with the table: a line for each kind of fault that was survived."""
    reports: Iterable[pytest.TestReport] = terminalreporter.getreports("passed")
    lines = [text for each in reports for name, text in each.user_properties if name == "chaos"]
    if lines:
        terminalreporter.section("faults survived")
        head = f"{'fault':<44}{'runs':>5}{'expected':>10}{'rows':>6}{'distinct':>10}{'s':>6}"
        for line in (head, *map(str, lines)):
            terminalreporter.line(line)
