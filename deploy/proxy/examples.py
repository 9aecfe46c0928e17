"""Write the example nginx.conf and Caddyfile, as `fedsigma server up` writes them for a server.

`make deploy-files` runs this script; a test fails if the examples differ from the code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedsigma.server.deployment.home import ServerConfig, ServerHome
from fedsigma.server.deployment.proxy import proxy_files

EXAMPLE = ServerConfig(name="Example server", address="fl.example.org:443", proxy="none")
FOLDER = "/var/lib/fedsigma/server"


def examples() -> dict[str, str]:
    """Return the text of each example file by name."""
    with tempfile.TemporaryDirectory() as folder:
        home = ServerHome.create(Path(folder) / "server", EXAMPLE, own=None)
        return {name: text.replace(str(home.path), FOLDER) for name, text in proxy_files(home).items()}


if __name__ == "__main__":
    for name, text in examples().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
