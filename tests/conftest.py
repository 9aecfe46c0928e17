"""Marks that the tests use."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes a minute or more, starts Ray; leave out by -m 'not slow'")
