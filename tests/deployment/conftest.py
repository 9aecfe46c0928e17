"""One server with three sites for all tests of this folder: starting them takes half a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deployment.parts import Deployment, deployed


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A running server and three sites that have joined it."""
    with deployed(tmp_path_factory.mktemp("deployment")) as found:
        yield found
