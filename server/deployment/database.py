"""Which site each node is, for the process that runs a study at a centre."""

from __future__ import annotations

import os
from pathlib import Path

from fedsigma.server.deployment.registry import REVOKED, Registry

__all__ = ["NodeNames"]


class NodeNames:
    """The sites that a centre has let in, by node.

    A node proves by its key that it is the one that was let in; what it calls itself, it could make up. So at
    a centre the name in a site's answer has to be the one that belongs to its node.

    Args:
        path: of the centre's folder.
    """

    def __init__(self, path: Path) -> None:
        self._registry = Registry(path / "centre.db")

    @classmethod
    def of_this_process(cls) -> NodeNames | None:
        """Those of the centre whose `fedsigma server up` started this process; None in a simulation."""
        folder = os.environ.get("FEDSIGMA_CENTRE", "")
        return cls(Path(folder)) if folder else None

    def problem(self, node: int, name: str) -> str:
        """Say why this node cannot be the site of this name; empty if it is. Sites may join meanwhile."""
        keys = {k.node_id: s.name for s in self._registry.sites() for k in s.keys if k.state != REVOKED}
        known = keys.get(str(node))
        if known == name:
            return ""
        return (
            f"its node belongs to site '{known}'" if known else "its node belongs to no site of this centre"
        )
