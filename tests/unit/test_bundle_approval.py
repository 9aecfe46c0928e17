"""App bundles at a site: approval, differences, and the guard in front of Flower's ClientApp."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from fedsigma.client.deployment import bundle_approval as module
from fedsigma.client.deployment.bundle_approval import (
    BundleApprovals,
    BundleError,
    bundle_digest,
    diff_bundles,
)
from fedsigma.client.deployment.guarded_clientapp import BundleNotApproved, _error_type, check_bundle
from fedsigma.client.site.policy import SitePolicy
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.simulation.app_bundle import write_app

RULES = """\
name: north   # our name
source: folder:/data
studies: []
bundles: []   # none yet
max_rounds: 5
"""


def bundle(**files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


ONE, TWO = bundle(a="x = 1\n", b="same\n"), bundle(a="x = 2\n", b="same\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site.yaml").write_text(RULES)
    (tmp_path / "worker").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "line",
    ["bundles: []   # none yet\n", "bundles:  # none yet\n", "", f"bundles:\n  - {'ab' * 32}\n"],
    ids=["empty", "no-value", "absent", "one"],
)
def test_approval_adds_to_site_yaml_and_changes_nothing_else(line: str, site: Path) -> None:
    file = site / "site.yaml"
    text = RULES.replace("bundles: []   # none yet\n", line)
    file.write_text(text)
    if line == "bundles:  # none yet\n":
        with pytest.raises(ConfigError):
            SitePolicy.read(file)
        return
    before = SitePolicy.read(file)
    BundleApprovals(site).approve(ONE)
    BundleApprovals(site).approve(ONE)
    BundleApprovals(site).approve(TWO)
    after = SitePolicy.read(file)
    assert set(after.bundles) == {*before.bundles, bundle_digest(ONE), bundle_digest(TWO)}
    assert len(after.bundles) == len(before.bundles) + 2
    assert "# our name" in file.read_text() and after.max_rounds == 5


def test_list_that_cannot_be_extended_is_left_unchanged(site: Path) -> None:
    file = site / "site.yaml"
    text = RULES.replace("bundles: []   # none yet", f"bundles: [{'ab' * 32}]")
    file.write_text(text)
    with pytest.raises(ConfigError):
        BundleApprovals(site).approve(ONE)
    assert file.read_text() == text and not file.with_name("site.yaml.new").exists()


def test_a_refused_bundle_waits_for_approval(site: Path) -> None:
    with pytest.raises(BundleNotApproved):
        check_bundle(ONE, site / "site.yaml")
    (line,) = HashChainedLog(site / "audit.jsonl").lines()
    assert line["request"] == {"message": "bundle", "bundle": bundle_digest(ONE)}
    assert line["reply"]["fields"] == {"error": "BundleNotApproved"}
    mine = BundleApprovals(site)
    assert [path.stem for path in mine.pending()] == [bundle_digest(ONE)]
    assert mine.find(bundle_digest(ONE)[:8]) == ONE
    mine.approve(ONE)
    check_bundle(ONE, site / "site.yaml")
    assert mine.pending() == [] and mine.last_approved() == ONE
    with pytest.raises(BundleNotApproved):
        check_bundle(TWO, site / "site.yaml")


def test_refused_bundles_do_not_fill_the_disk(site: Path) -> None:
    mine = BundleApprovals(site)
    for number in range(module.MAX_PENDING + 5):
        mine.add_pending(bundle(a=str(number)))
    assert len(mine.pending()) == module.MAX_PENDING


def test_bundle_replaced_while_waiting_is_not_approved(site: Path) -> None:
    mine = BundleApprovals(site)
    mine.add_pending(ONE)
    mine.pending()[0].write_bytes(TWO)
    with pytest.raises(BundleError, match="was changed"):
        mine.find(bundle_digest(ONE))
    for wrong in ("zz", "abcdef", "*"):
        with pytest.raises(BundleError, match="names no single bundle"):
            mine.find(wrong)


def test_what_a_bundle_changes_is_shown() -> None:
    shown = diff_bundles(ONE, TWO)
    assert "-x = 1" in shown and "+x = 2" in shown and "same" not in shown
    assert "+same" in diff_bundles(None, ONE)
    assert "\x1b" not in diff_bundles(None, bundle(a="\x1b[2Jprint()\n"))
    for bad in (b"no zip", bundle(a="x" * (3 << 20))):
        with pytest.raises(BundleError):
            diff_bundles(None, bad)


def test_the_text_of_an_error_stays_at_the_site() -> None:
    assert (
        _error_type("<class 'fedsigma.client.deployment.guarded_clientapp.BundleNotApproved'>:<'abc'>")
        == "BundleNotApproved"
    )
    assert _error_type("<class 'FileNotFoundError'>:<'/data/patient-7'>") == "FileNotFoundError"
    assert _error_type("An exception at /data/patient-7") == "ClientAppError"


def test_the_app_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Sites approve it once; were it different each time, approval would become a habit."""
    from fedsigma.common.ops.flower_compat import build_fab_from_disk

    first, second = (build_fab_from_disk(write_app(tmp_path / name)) for name in ("a", "b"))
    assert first == second == build_fab_from_disk(write_app(tmp_path / "a"))
    assert "from fedsigma.client.app import app" in diff_bundles(None, first)


def test_a_bundle_that_was_approved_once_and_is_no_longer_can_be_approved_again(site: Path) -> None:
    bundles = BundleApprovals(site)
    bundles.approve(ONE)
    (site / "site.yaml").write_text(RULES)
    bundles.add_pending(ONE)
    assert bundles.find(bundle_digest(ONE)) == ONE
    bundles.approve(ONE)
    assert SitePolicy.read(site / "site.yaml").bundles == (bundle_digest(ONE),) and bundles.pending() == []
