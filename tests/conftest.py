"""What every test shares: GPU tests are skipped, with the reason, where they cannot run."""

from __future__ import annotations

import pytest
from gpu_record import why_no_gpu


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # then its setting in pyproject.toml would be unknown
        parser.addini("timeout", "seconds a test may take; without pytest-timeout it has no effect")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    # The check imports torch; a run without GPU tests does not wait for it.
    if gpu_items and (reason := why_no_gpu()):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {reason}"))
