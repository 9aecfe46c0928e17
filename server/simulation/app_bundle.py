"""The Flower app that runs an installed FedSigma: two lines of code, the same for every study.

Sites receive only this bundle and run their own installed FedSigma. A site that has approved the bundle once
has therefore approved no code other than what its own staff install.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_app"]

_APP_TOML = """\
[project]
name = "fedsigma-study"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsigma"
fab-include = ["fedsigma_study/*.py"]

[tool.flwr.app.components]
serverapp = "fedsigma_study.serverapp:app"
clientapp = "fedsigma_study.clientapp:app"

[tool.flwr.app.config]
study = "demo"
out = ""
resume = false
seed = -1
rounds = 0
trackers = ""
"""
_GLUE = '''"""Flower entry point."""
from fedsigma.{side}.app import app as _app

app = _app
'''


def write_app(folder: Path) -> Path:
    """Write the app into a folder, with the same bytes each time; returns the folder."""
    package = folder / "fedsigma_study"
    package.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_APP_TOML, encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    for side in ("server", "client"):
        (package / f"{side}app.py").write_text(_GLUE.format(side=side), encoding="utf-8")
    return folder
