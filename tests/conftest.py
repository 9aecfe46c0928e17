"""Settings of the whole test run."""

from typing import Any

import pytest
from hypothesis import settings

from fedsigma.client.site.image_cache import IMAGES

pytest_plugins = ("tests.helpers.dashboard_door",)

# Machines are shared and noisy: how long an example takes must not decide whether it passes.
settings.register_profile("fedsigma", deadline=None, print_blob=True)
settings.load_profile("fedsigma")


@pytest.fixture(autouse=True)
def empty_image_cache() -> None:
    """Start each test without decoded images, as a new process does."""
    IMAGES.reset()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes, keep together what shares something that is slow to make.

    That is a file, and all of `deployment`, whose tests share one server with its sites.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "deployment" if "deployment/" in file else file

    return Scheduling(config, log)
