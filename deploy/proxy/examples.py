"""Write nginx.conf and Caddyfile as `fedsigma server up` writes them, for a server of example values.

`make deploy-files` does. They are there to be read before a server exists; the test of deploy/ fails if they
say anything else than the code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedsigma.server.deployment.home import ServerConfig, ServerHome
from fedsigma.server.deployment.proxy import caddyfile, nginx_conf

EXAMPLE = ServerConfig(name="Example server", address="fl.example.org:443", proxy="none")
FOLDER = "/var/lib/fedsigma/server"


def examples() -> dict[str, str]:
    """The text of each example file, by name."""
    with tempfile.TemporaryDirectory() as place:
        folder = ServerHome.create(Path(place) / "server", EXAMPLE, own=None)
        made = {"nginx.conf": nginx_conf(folder), "Caddyfile": caddyfile(folder)}
        return {name: text.replace(str(folder.path), FOLDER) for name, text in made.items()}


if __name__ == "__main__":
    for name, text in examples().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
