"""A pytest plugin that makes a long run of tests one that can be taken up again: it writes down how each test ended, as it ends, and
leaves out those that have passed already.

    CLUSTERFUSION_TEST_JOURNAL=FILE python3 -m pytest -p run_journal ...

The journal is lines of JSON: what its tests ran on (`begin`), then {"test": node id, "outcome": "passed", "failed" or "skipped"}. A
line that an interruption has cut short does not count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "CLUSTERFUSION_TEST_JOURNAL"


def begin(path: Path, ran_on: dict[str, Any]) -> dict[str, str]:
    """How tests ended on just this; the journal of anything else is begun anew."""
    lines = _lines(path)
    if not lines or lines[0] != {"ran_on": ran_on}:
        lines = [{"ran_on": ran_on}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {line["test"]: line["outcome"] for line in lines[1:]}


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get(VARIABLE):
        config.pluginmanager.register(Journal(Path(path)), "journal_of_this_run")


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        passed = {line["test"] for line in _lines(self.path)[1:] if line["outcome"] == "passed"}
        left_out = [item for item in items if item.nodeid in passed]
        if left_out:
            items[:] = [item for item in items if item.nodeid not in passed]
            config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "PYTEST_XDIST_WORKER" in os.environ:  # whose reports come to the process that started it
            return
        if report.failed or report.skipped:
            self.ended.setdefault(report.nodeid, report.outcome)
        if report.when == "teardown":
            line = {"test": report.nodeid, "outcome": self.ended.pop(report.nodeid, "passed")}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
