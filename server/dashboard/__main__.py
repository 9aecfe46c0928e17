"""The dashboard of a centre as a process: python -m fedsigma.server.dashboard FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from fedsigma.cli.dashboard import dashboard

if __name__ == "__main__":
    dashboard(Path(sys.argv[1]))
