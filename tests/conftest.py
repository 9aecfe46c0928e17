"""Settings of the whole test run."""

from pathlib import Path

import pytest
from hypothesis import settings

# Machines are shared and noisy: how long an example takes must not decide whether it passes.
settings.register_profile("fedsigma", deadline=None, print_blob=True)
settings.load_profile("fedsigma")


# Before xdist reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, keep together what shares something that is slow to make.

    That is a file, and all of `deployment`, whose tests share one centre with its sites; those go first,
    since they take longest.
    """
    for item in items:
        path = Path(str(item.fspath))
        group = "deployment" if path.parent.name == "deployment" else path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: Path(str(item.fspath)).parent.name != "deployment")
