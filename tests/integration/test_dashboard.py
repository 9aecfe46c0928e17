"""The dashboard of a folder of runs, as a process of its own, in a real browser."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.registry import ModelRegistry
from fedsigma.common.registry.manifest import Manifest
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.browser import MISSING, Seen, chromium
from tests.helpers.dashboard_process import dashboard
from tests.helpers.synthetic_run import HOSTILE, write_synthetic_run

if not MISSING:
    from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_synthetic_run(folder / "plain")
    write_synthetic_run(folder / "group" / "other", rounds=12, seed=3, troubles=False)
    write_synthetic_run(folder / "hostile", sites=HOSTILE, name="<b>bold</b> & co", rounds=3)
    write_synthetic_run(folder / "many", sites=[f"hospital-{n:02d}" for n in range(1, 31)], rounds=5)
    write_synthetic_run(folder / "failed", finished=2, fail="no round produced a model")
    made = Manifest(
        name="smears",
        version=0,
        created="",
        origin="trained",
        backbone="starter",
        weights="0" * 64,
        layout="1" * 64,
        study="2" * 64,
        classes=("a", "b"),
        rounds=3,
        results={"federated": {"accuracy": 0.625}, "zero_shot": {"accuracy": 0.25}},
    )
    card = "# smears\n\n<script>alert(1)</script>\n\n| method | accuracy |\n|---|---:|\n| this | 62.5 % |\n"
    ModelRegistry(folder / "models").add(made, {"card.md": card.encode()})
    return folder


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[tuple[str, str]]:
    with dashboard(runs) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def signed_in(served: tuple[str, str], browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cookies of a browser that followed the link."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(served[1])
    expect(page).to_have_title("Runs – FedSigma")
    path = tmp_path_factory.mktemp("cookies") / "state.json"
    context.storage_state(path=path)
    context.close()
    return path


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def page(served: tuple[str, str], browser: Browser, signed_in: Path, seen: Seen) -> Iterator[Page]:
    """A signed-in page; script errors and requests to other hosts fail the test."""
    context = browser.new_context(
        base_url=served[0], storage_state=signed_in, viewport={"width": 1280, "height": 900}
    )
    found = context.new_page()
    seen.watch(found)
    yield found
    context.close()
    assert seen.problems == []
    assert seen.hosts <= {served[0].removeprefix("http://")}


def option(page: Page, chart: str) -> dict[str, Any]:
    """Return the ECharts options of a chart."""
    instance = "echarts.getInstanceByDom(document.getElementById(id))"
    page.wait_for_function(f"id => Boolean({instance})", arg=chart)
    return dict(json.loads(page.evaluate(f"id => JSON.stringify({instance}.getOption())", chart)))


def test_script_of_a_page_runs_once(page: Page) -> None:
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto("/runs/plain")
    page.wait_for_timeout(2600)
    assert sum("/state/plain" in url for url in urls) == 1
    assert sum("app.js" in url for url in urls) == 1


def test_nothing_is_served_without_the_link_which_works_once(
    served: tuple[str, str], signed_in: Path
) -> None:
    base, link = served
    assert httpx.get(f"{base}/health").text == "ok\n"
    for path in (
        "/",
        "/runs/plain",
        "/state/plain",
        "/models",
        "/compare",
        "/report/plain",
        "/static/app.js",
    ):
        assert httpx.get(base + path).status_code == 401, path
    again = httpx.get(link)
    assert again.status_code in (401, 403) and "set-cookie" not in again.headers


def test_list_of_runs_can_be_filtered(page: Page) -> None:
    page.goto("/")
    rows = page.locator("#runs tbody tr")
    assert rows.count() == 5
    failed = rows.filter(has_text="no round produced a model")
    expect(failed.locator(".state")).to_have_text("failed")
    page.get_by_label("Find").fill("failed")
    expect(page.locator("#shown")).to_have_text("1 of 5 shown")
    assert rows.locator("visible=true").count() > 0 and failed.is_visible()
    assert not rows.filter(has_text="bold").is_visible()


def test_run_page_shows_the_values_of_its_report(page: Page, runs: Path) -> None:
    page.goto("/runs/plain")
    summary = json.loads((runs / "plain" / "summary.json").read_text())
    accuracy = f"{100 * summary['federated']['accuracy']:.1f}%"
    expect(page.locator(".numbers dd").first).to_have_text(accuracy)
    results = page.get_by_role("region", name="Results over the test images")
    expect(results.get_by_role("row", name="Federated")).to_contain_text(accuracy)
    curves = option(page, "curves")
    assert [one["name"] for one in curves["series"]] == ["north", "east", "south", "west", "All sites"]
    expected = {
        row["round"]: row["accuracy"] for row in RunDir(runs / "plain").rounds() if row["site"] == ALL_SITES
    }
    drawn = {point[0] + 1: point[1] for point in curves["series"][-1]["data"]}
    assert drawn == pytest.approx(expected, abs=1e-3)
    notices = page.get_by_role("region", name="Problems during the run")
    expect(notices).to_contain_text("the shift's norm 81.2 is above the bound 50")
    expect(notices.get_by_role("row", name="annex")).to_contain_text("site refused")


def test_participation_is_drawn_by_site_and_round(page: Page) -> None:
    page.goto("/runs/plain")
    cells = option(page, "participation")["series"][0]["data"]
    statuses = {(x, y): status for x, y, status in cells}
    # North was late in round 6; west was rejected in rounds 3, 4, 5 and 8, and failed in 6.
    assert [cell for cell, status in statuses.items() if status == 1] == [(5, 0)]
    assert sorted(cell for cell, status in statuses.items() if status == 2) == [
        (2, 3),
        (3, 3),
        (4, 3),
        (7, 3),
    ]
    assert [cell for cell, status in statuses.items() if status == 3] == [(5, 3)]
    assert sum(status == 0 for status in statuses.values()) == 4 * 11 - 6


def test_slider_selects_the_round_of_the_shift(page: Page, runs: Path) -> None:
    page.goto("/runs/plain")
    lines = RunDir(runs / "plain").shift_magnitudes()
    slider = page.get_by_label("After round")
    expect(slider).to_have_attribute("max", str(len(lines) - 1))
    for at, line in ((len(lines) - 1, lines[-1]), (2, lines[2])):
        slider.fill(str(at))
        expect(page.locator("#shift-round-value")).to_have_text(str(line["round"]))
        drawn = {(x, y): value for x, y, value in option(page, "shift-magnitude")["series"][0]["data"]}
        tower = line["towers"]["image"]
        for y, values in enumerate(tower["parts"].values()):
            assert [drawn[x, y] for x in range(len(tower["layers"]))] == values


def test_metrics_of_curves_and_updates_can_be_selected(page: Page) -> None:
    page.goto("/runs/many")
    page.locator("#metric").select_option("loss")
    assert option(page, "curves")["xAxis"][0]["name"] == "round"
    page.locator("#update-metric").select_option("update_cosine")
    values = [point[1] for one in option(page, "updates")["series"] for point in one["data"]]
    assert values and all(-1 <= value <= 1 for value in values)
    page.get_by_label("Highlight").select_option("hospital-07")
    widths = {one["name"]: one["lineStyle"]["width"] for one in option(page, "updates")["series"]}
    assert [name for name, width in widths.items() if width > 2] == ["hospital-07"]


def test_masked_updates_are_explained(page: Page, runs: Path, tmp_path: Path) -> None:
    source = runs / "masked"
    folder = write_synthetic_run(source, rounds=2, finished=0, troubles=False)
    text = folder.study_yaml.replace("strategy: fedavg", "strategy: fedavg\n  masking: true")
    (source / "study.yaml").write_text(text)
    folder.log_round(1, "north", {}, 10, 10, "accepted")
    folder.log_round(1, ALL_SITES, {"accuracy": 0.5}, 0, 0, ALL_SITES)
    time.sleep(1.1)
    page.goto("/runs/masked")
    expect(page.locator("#updates")).to_contain_text("the server only learns the sum of the updates")
    expect(page.locator("#update-metric")).to_be_disabled()


def test_live_run_is_updated_without_a_reload(page: Page, runs: Path) -> None:
    folder = write_synthetic_run(runs / "live", rounds=6, finished=2, troubles=False)
    time.sleep(1.1)  # the list of folders is read again after a second
    ended = threading.Event()

    def write_rounds() -> None:
        with folder.lock():
            for number in (3, 4):
                step.wait(20)
                step.clear()
                folder.log_event("round_start", round=number, sites=["north", "east"])
                folder.log_round(number, "north", {"accuracy": 0.9}, 1000, 1000, "accepted")
                folder.log_round(number, "east", {}, 0, 1000, "late", "no reply within 600 s")
                folder.log_event("site_timed_out", round=number, site="east")
                folder.log_round(number, ALL_SITES, {"accuracy": 0.91}, 0, 0, ALL_SITES)
                folder.log_event("round_end", round=number, sites=["north"], seconds=1.0)
            ended.wait(20)

    step = threading.Event()
    writer = threading.Thread(target=write_rounds)
    writer.start()
    try:
        page.goto("/runs/live")
        expect(page.locator(".state")).to_have_text("running")
        expect(page.locator(".facts")).to_contain_text("2 of 6")
        page.evaluate("window.mark = 'the same page'")
        page.locator("#d-events summary").click()
        step.set()
        expect(page.locator(".facts")).to_contain_text("3 of 6", timeout=10_000)
        step.set()
        expect(page.locator(".facts")).to_contain_text("4 of 6", timeout=10_000)
        assert option(page, "curves")["series"][-1]["data"][-1] == [3, 0.91]
        expect(page.get_by_role("row", name="east late in round 4")).to_be_visible()
        # Opened details stay open, and the page was not reloaded.
        assert page.locator("#d-events").get_attribute("open") is not None
        assert page.evaluate("window.mark") == "the same page"
    finally:
        ended.set()
        writer.join()
    expect(page.locator(".state")).to_have_text("interrupted", timeout=10_000)


def test_two_runs_are_compared(page: Page, runs: Path) -> None:
    page.goto("/")
    button = page.get_by_role("button", name="Compare the two selected runs")
    expect(button).to_be_disabled()
    page.get_by_label("Compare plain").check()
    page.get_by_label("Compare group/other").check()
    button.click()
    page.wait_for_url("**/compare?*")
    settings = page.get_by_role("region", name="Settings that differ")
    expect(settings.get_by_role("row")).to_have_count(2)
    row = settings.get_by_role("row", name="federation.rounds")
    assert sorted(row.get_by_role("cell").all_inner_texts()) == ["10", "12"]
    series = option(page, "curves")["series"]
    assert sorted(len(one["data"]) for one in series) == [11, 13]
    north = page.get_by_role("region", name="Latest accuracy").get_by_role("row", name="north")
    one, two, less = north.get_by_role("cell").all_inner_texts()
    difference = float(two.rstrip("%")) - float(one.rstrip("%"))
    assert float(less.replace("\N{MINUS SIGN}", "-")) == pytest.approx(difference, abs=0.11)


def test_names_from_a_run_are_escaped(page: Page) -> None:
    page.goto("/runs/hostile")
    expect(page.locator("h1")).to_have_text("<b>bold</b> & co")
    for name in HOSTILE:
        assert page.get_by_role("rowheader", name=name, exact=True).count() >= 1
    assert page.locator("main script:not([type])").count() == 0 and page.locator("main img").count() == 0


def test_versions_are_listed_with_their_cards(page: Page) -> None:
    page.goto("/models")
    row = page.get_by_role("row", name="smears@1")
    expect(row).to_contain_text("62.5%")
    row.get_by_role("link").click()
    expect(page.locator(".card h1")).to_have_text("smears")
    expect(page.locator(".card")).to_contain_text("<script>alert(1)</script>")
    assert page.locator(".card td").last.evaluate("one => getComputedStyle(one).textAlign") == "right"


def test_changed_version_is_reported(page: Page, runs: Path) -> None:
    card = runs / "models" / "smears" / "1" / "card.md"
    was = card.read_bytes()
    card.write_bytes(was + b"better than it is")
    try:
        page.goto("/models")
        expect(page.get_by_role("alert")).to_contain_text("was changed or is missing")
    finally:
        card.write_bytes(was)


def test_keys_cannot_escape_the_folder(page: Page) -> None:
    for path in (
        "/runs/..%2Fplain",
        "/runs/nowhere",
        "/report/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2fpages.py",
    ):
        answer = page.request.get(path)
        assert answer.status in (400, 404), path
    page.goto("about:blank")


def test_colour_scheme_can_be_selected_and_persists(page: Page) -> None:
    page.goto("/runs/plain")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_label("Colours").select_option("dark")
    dark = page.evaluate(paper)
    assert light == "rgb(253, 252, 250)" and dark == "rgb(21, 25, 28)"
    page.goto("/")
    assert page.evaluate(paper) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/runs/plain", "/compare?run=plain&run=group/other", "/models"])
def test_pages_are_accessible(
    served: tuple[str, str], browser: Browser, signed_in: Path, path: str, scheme: Any
) -> None:
    """Checked by axe against WCAG 2.2 A and AA."""
    from axe_playwright_python.sync_playwright import Axe

    # The checker is injected into the page, which the content policy would forbid.
    context = browser.new_context(
        base_url=served[0], storage_state=signed_in, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.goto(path)
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": tags}})
    context.close()
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("width", [820, 1366])
def test_pages_fit_a_tablet_and_a_laptop(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for path in ("/", "/runs/many", "/compare?run=plain&run=group/other"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pages_can_be_used_by_keyboard(page: Page) -> None:
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('href')") == "/runs/plain":
            break
    page.goto("/runs/plain")
    expect(page.locator("#shift-round-value")).not_to_have_text("")
    page.get_by_label("After round").focus()
    page.keyboard.press("Home")
    expect(page.locator("#shift-round-value")).to_have_text("1")


def test_page_shows_that_the_dashboard_does_not_respond(page: Page, seen: Seen) -> None:
    page.goto("/runs/plain")
    page.route("**/state/**", lambda route: route.abort())
    expect(page.locator("#offline")).to_be_visible(timeout=10_000)
    page.unroute("**/state/**")
    expect(page.locator("#offline")).to_be_hidden(timeout=10_000)
    # The browser reports the aborted requests.
    assert {problem.split(" ")[-1] for problem in seen.problems} == {"net::ERR_FAILED"}
    seen.problems.clear()
