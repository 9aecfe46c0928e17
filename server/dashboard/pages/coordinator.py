"""Pages that only a server has: sites, audit log, and starting, stopping and resuming runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from fedsigma.common.config.study import study_names
from fedsigma.common.utils.hash_chain import HashChainedLog, LogTampered
from fedsigma.server.dashboard.auth.middleware import operator_only
from fedsigma.server.dashboard.pages.routes import DashboardContext, etag_of, json_response
from fedsigma.server.dashboard.pages.run_view import describe_event
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch, site_rows
from fedsigma.server.deployment.flower_control import ControlError
from fedsigma.server.deployment.home import ServerHome, ServerHomeError
from fedsigma.server.deployment.studies import Studies

__all__ = ["coordinator_routes"]

MAX_AUDIT_ROWS = 500
CONTACT_RUNS = 20
"""Number of newest runs whose events are read for the sites' last contacts."""


def coordinator_routes(context: DashboardContext, server: ServerHome, watch: SuperLinkWatch) -> list[Route]:
    """Return the routes that only a server's dashboard has."""
    pages = _Pages(context, server, watch)
    return [
        Route("/sites", pages.sites),
        Route("/state-of-sites", pages.sites_state),
        Route("/audit", pages.audit),
        Route("/start", operator_only(pages.start_form)),
        Route("/start", operator_only(pages.start), methods=["POST"]),
        Route("/stop/{key:path}", operator_only(pages.stop), methods=["POST"]),
        Route("/resume/{key:path}", operator_only(pages.resume), methods=["POST"]),
    ]


class _Pages:
    """The endpoints; Starlette runs those that are not coroutines in a thread, because they read files."""

    def __init__(self, context: DashboardContext, server: ServerHome, watch: SuperLinkWatch) -> None:
        self._context, self._server, self._watch = context, server, watch

    def sites(self, request: Request) -> Response:
        return self._context.render_page(request, "sites.html", **self._sites())

    def sites_state(self, request: Request) -> Response:
        html = self._context.render(request, "sites_list.html", **self._sites())
        return json_response(request, etag_of(html), {"parts": {"sites": html}})

    def _sites(self) -> dict[str, Any]:
        index = self._context.run_index
        keys = [entry.key for entry in index.list_runs() if entry.started][:CONTACT_RUNS]
        events = [event for key in keys for event in index.open_run(key).events()]
        return {"sites": site_rows(index.database, self._watch, events), "error": self._watch.error}

    def audit(self, request: Request) -> Response:
        lines: list[dict[str, Any]] = []
        head = error = ""
        try:
            lines, verified = HashChainedLog(self._server.path / "audit.jsonl").check()
            head = str(verified)
        except LogTampered as problem:
            error = f"Verification of the audit log failed: {problem.what}. Compare the log with a backup."
        rows = [describe_event(line) for line in reversed(lines[-MAX_AUDIT_ROWS:])]
        return self._context.render_page(
            request, "audit.html", rows=rows, count=len(lines), head=head, error=error
        )

    def start_form(self, request: Request) -> Response:
        return self._form(request, {"bundled": "", "text": "", "rounds": 0, "seed": -1})

    def _form(self, request: Request, values: dict[str, Any], *, error: str = "") -> Response:
        status = 400 if error else 200
        return self._context.render_page(
            request, "start.html", status=status, bundled=study_names(), values=values, error=error
        )

    async def start(self, request: Request) -> Response:
        # On an error, show the form with the values that were entered.
        form = await request.form()
        values = {key: str(form.get(key, "")).strip() for key in ("bundled", "text", "rounds", "seed")}
        try:
            await run_in_threadpool(self._submit, request, values, again="again" in form)
        except (ValueError, ServerHomeError, ControlError) as error:
            return self._form(request, values, error=str(error))
        self._watch.refresh()
        return RedirectResponse("/", 303)

    def _submit(self, request: Request, values: dict[str, str], *, again: bool) -> None:
        rounds, seed = max(0, _parse_int(values, "rounds", 0)), max(-1, _parse_int(values, "seed", -1))
        if not values["bundled"] and not values["text"]:
            raise ServerHomeError("no study was given: choose one, or paste a study file")
        if values["bundled"] not in ("", *study_names()):
            raise ServerHomeError(
                f"no study '{values['bundled']}' is included in FedSigma: choose one from the list"
            )
        with TemporaryDirectory(prefix="fedsigma-") as folder:
            file = Path(folder) / "study.yaml"
            file.write_text(values["text"], encoding="utf-8")
            studies = Studies(self._server, by=request.state.user.name)
            studies.submit(values["bundled"] or str(file), again=again, rounds=rounds, seed=seed)

    def stop(self, request: Request) -> Response:
        return self._act(request, Studies.stop)

    def resume(self, request: Request) -> Response:
        return self._act(request, Studies.resume)

    def _act(self, request: Request, action: Callable[[Studies, str], Any]) -> Response:
        entry = self._context.run_index.find_run(request.path_params["key"])
        try:
            action(Studies(self._server, by=request.state.user.name), entry.run_id)
        except (ServerHomeError, ControlError) as error:
            values = {"title": "Action failed", "message": str(error)}
            return self._context.render_page(request, "error.html", status=409, **values)
        self._watch.refresh()
        return RedirectResponse(f"/runs/{entry.key}" if entry.started else "/", 303)


def _parse_int(values: dict[str, str], key: str, empty: int) -> int:
    try:
        return int(values[key] or empty)
    except ValueError:
        raise ServerHomeError(f"{key} is '{values[key]}', expected a whole number") from None
