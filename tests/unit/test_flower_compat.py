"""What FedSigma uses of Flower's private modules is there, and stands in one module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedsigma.common.ops import flower_compat
from fedsigma.common.ops.flower_compat import MODULES, FlowerMoved

ROOT = Path(__file__).parents[2]
FOLDERS = ("common", "client", "server", "fedsigma", "bench", "tests")
PRIVATE = re.compile(
    r"^\s*(?:from|import) flwr\.(?:cli|common|proto|server|supercore|superlink|supernode|simulation)\b"
    r"|[\"']_(?:message|src_node|dst_node|reply_to_message)_id[\"']",
    re.MULTILINE,
)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_installed_flower_has_the_name(name: str) -> None:
    assert getattr(flower_compat, name) is not None


def test_clientapp_module_has_what_the_guard_replaces() -> None:
    module = flower_compat.clientapp_module()
    assert all(callable(getattr(module, name)) for name in flower_compat.GUARDED)


def test_message_metadata_can_be_set() -> None:
    flower_compat.set_task_identity(7)
    message = Message(RecordDict(), dst_node_id=2, message_type="train")
    assert message.metadata.src_node_id == 7
    flower_compat.set_message_id(message, "m1")
    flower_compat.set_source_node(message, 3)
    assert (message.metadata.message_id, message.metadata.src_node_id) == ("m1", 3)


def test_moved_name_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "Elsewhere", "flwr.supercore.nowhere")
    with pytest.raises(FlowerMoved, match=r"^Flower [\d.]+ has no flwr\.supercore\.nowhere\.Elsewhere: "):
        _ = flower_compat.Elsewhere
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = flower_compat.absent


def test_no_other_file_uses_private_names() -> None:
    users = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("flower_compat.py", Path(__file__).name)
        and PRIVATE.search(path.read_text(encoding="utf-8"))
    ]
    assert not users, f"these files use Flower's private names: move them to flower_compat.py: {users}"
