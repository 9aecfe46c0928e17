"""Use a server's dashboard as an operator and a viewer, in a browser on the server's machine.

`python browse.py ADDRESS STUDY PASSWORD FOLDER TRUST` prints its observations as one JSON object, last.
"""

from __future__ import annotations

import json
import re
import ssl
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx
from playwright.sync_api import Browser, Page, expect

from tests.helpers.browser import Seen, chromium

PATIENCE_MS = 240_000


def sign_in(browser: Browser, address: str, name: str, password: str, seen: Seen) -> Page:
    # The certificate is issued by the server's own authority, which the browser does not trust.
    context = browser.new_context(
        base_url=address, ignore_https_errors=True, viewport={"width": 1366, "height": 900}
    )
    page = context.new_page()
    seen.watch(page)
    page.goto("/audit")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in", exact=True).click()
    page.wait_for_url("**/audit")
    page.on("dialog", lambda dialog: dialog.accept())
    return page


def start(page: Page, study: str) -> str:
    """Start a study and return the key of its run once the run has started."""
    page.goto("/")
    keys = set(page.locator("#runs tbody th small").all_inner_texts())
    page.get_by_role("link", name="Start a study").click()
    page.get_by_label("Or a study file").fill(study)
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile("/$"))
    link = page.locator("#runs tbody tr").first.get_by_role("link")
    expect(link).to_be_visible(timeout=PATIENCE_MS)
    key = str(page.locator("#runs tbody tr").first.locator("th small").inner_text())
    assert key not in keys
    link.click()
    return key


def watch(page: Page) -> dict[str, Any]:
    """Observe a run's page, without interaction, until the run is finished."""
    page.evaluate("window.mark = 'never loaded again'")
    states, rounds = set(), set()
    while "finished" not in states:
        states.add(page.locator(".state").inner_text())
        rounds.add(page.locator(".facts .progress").inner_text().strip())
        page.wait_for_timeout(300)
    page.wait_for_timeout(2500)
    script = "JSON.stringify(echarts.getInstanceByDom(document.getElementById('curves')).getOption().series)"
    series = json.loads(page.evaluate(script))
    return {
        "mark": page.evaluate("window.mark"),
        "states": sorted(states),
        "rounds": sorted(rounds),
        "points": {one["name"]: len(one["data"]) for one in series},
        "updates": page.locator("#update-metric option").count(),
        "sites": page.get_by_role("region", name="Status and latest values").inner_text(),
        "numbers": page.locator(".numbers").inner_text(),
    }


def main(address: str, study: Path, password: str, folder: Path, trust: Path) -> None:
    text, seen = study.read_text(), Seen()
    tls = ssl.create_default_context(cafile=str(trust))
    health = httpx.get(f"{address}/health", verify=tls).text
    with chromium() as browser:
        page = sign_in(browser, address, "olga", password, seen)
        first = start(page, text)
        found: dict[str, Any] = {"health": health, "first": first, "watched": watch(page)}
        page.screenshot(path=folder / "run.png", full_page=True)
        page.goto("/sites")
        expect(page.locator("main")).to_contain_text("online", timeout=PATIENCE_MS)
        found["sites"] = page.locator("main").inner_text()
        # The study is rejected, and the form keeps its text.
        page.goto("/start")
        page.get_by_label("Or a study file").fill(text.replace("rounds: 2", "rounds: two"))
        page.get_by_role("button", name="Start").click()
        found["refused"] = page.get_by_role("alert").inner_text()
        found["kept"] = "rounds: two" in page.get_by_label("Or a study file").input_value()
        found["second"] = start(page, text.replace("rounds: 2", "rounds: 40").replace("seed: 1", "seed: 9"))
        expect(page.locator(".state")).to_have_text("running", timeout=PATIENCE_MS)
        watcher = sign_in(browser, address, "vera", password, seen)
        watcher.goto(f"/runs/{found['second']}")
        found["viewer sees"] = watcher.locator(".state").inner_text()
        found["viewer's buttons"] = watcher.get_by_role("button", name="Stop").count()
        csrf = watcher.locator("input[name=csrf]").first.input_value()
        origin = {"Origin": address}
        answer = watcher.request.post(f"/stop/{found['second']}", form={"csrf": csrf}, headers=origin)
        found["viewer's stop"] = answer.status
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".state")).to_have_text("interrupted", timeout=PATIENCE_MS)
        expect(page.get_by_role("button", name="Resume")).to_be_visible()
        page.goto(f"/compare?run={first}&run={found['second']}")
        found["settings"] = page.get_by_role("region", name="Settings that differ").inner_text()
        page.goto("/audit")
        found["audit"] = page.locator("main").inner_text()
    found["problems"] = [p for p in seen.problems if "status of 400" not in p]
    found["hosts"] = sorted(seen.hosts)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
