"""The pages that only a server has: its sites, its audit log, and studies to start, stop and go on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from fedsigma.common.config.study import study_names
from fedsigma.common.utils.hash_chain import HashChainedLog, LogTampered
from fedsigma.server.dashboard.auth.middleware import operator_only
from fedsigma.server.dashboard.pages.routes import DashboardContext, tag_of, told
from fedsigma.server.dashboard.pages.run_view import event_row
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch, site_lines
from fedsigma.server.deployment.flower_control import ControlError
from fedsigma.server.deployment.home import ServerHome, ServerHomeError
from fedsigma.server.deployment.studies import Studies
from fedsigma.server.report.formatting import NOTHING, format_timestamp

__all__ = ["coordinator_routes"]

MOST_LINES = 500
NEWEST_RUNS = 20
"""Of how many runs the events are read to tell when a site was heard of."""


def coordinator_routes(desk: DashboardContext, server: ServerHome, watch: SuperLinkWatch) -> list[Route]:
    """The routes of a server."""
    pages = CoordinatorPages(desk, server, watch)
    return [
        Route("/sites", pages.sites),
        Route("/state-of-sites", pages.sites_state),
        Route("/audit", pages.audit),
        Route("/start", operator_only(pages.start_form)),
        Route("/start", operator_only(pages.start), methods=["POST"]),
        Route("/stop/{key:path}", operator_only(pages.stop), methods=["POST"]),
        Route("/resume/{key:path}", operator_only(pages.resume), methods=["POST"]),
    ]


class CoordinatorPages:
    """Answers at a server's addresses."""

    def __init__(self, desk: DashboardContext, server: ServerHome, watch: SuperLinkWatch) -> None:
        self._desk, self._server, self._watch = desk, server, watch

    async def sites(self, request: Request) -> Response:
        """The sites, with their last contact."""
        values = await run_in_threadpool(self._sites)
        return self._desk.page(request, "sites.html", **values)

    async def sites_state(self, request: Request) -> Response:
        """The same, for the page's script."""
        text = self._desk.text(request, "sites_list.html", **await run_in_threadpool(self._sites))
        return told(request, tag_of(text), {"parts": {"sites": text}})

    def _sites(self) -> dict[str, Any]:
        library = self._desk.library
        keys = [line.key for line in library.lines() if line.begun][:NEWEST_RUNS]
        events = [event for key in keys for event in library.run(key).events()]
        rows = [
            (
                one.name,
                one.state,
                one.node or NOTHING,
                format_timestamp(one.contact),
                one.version or NOTHING,
                one.note,
            )
            for one in site_lines(library.registry, self._watch, events)
        ]
        return {"sites": rows, "problem": self._watch.problem}

    async def audit(self, request: Request) -> Response:
        """The server's audit log, verified."""
        chain = HashChainedLog(self._server.path / "audit.jsonl")
        lines: list[dict[str, Any]] = []
        head = broken = ""
        try:
            lines, found = await run_in_threadpool(chain.check)
            head = str(found)
        except LogTampered as error:
            broken = f"The audit log does not verify: {error.what}. Compare it with a backup."
        rows = [event_row(line) for line in reversed(lines[-MOST_LINES:])]
        return self._desk.page(request, "audit.html", rows=rows, count=len(lines), head=head, broken=broken)

    async def start_form(self, request: Request) -> Response:
        """The form for a new study."""
        return self._form(request, {"bundled": "", "text": "", "rounds": 0, "seed": -1})

    def _form(self, request: Request, values: dict[str, Any], *, error: str = "") -> Response:
        names = study_names()
        status = 400 if error else 200
        return self._desk.page(
            request, "start.html", status=status, bundled=names, values=values, error=error
        )

    async def start(self, request: Request) -> Response:
        """Hand a study to the sites, or say why it does not do; what was typed stays."""
        form = await request.form()
        values = {key: str(form.get(key, "")).strip() for key in ("bundled", "text", "rounds", "seed")}
        try:
            await run_in_threadpool(self._submit, form, values, by=request.state.user.name)
        except (ValueError, ServerHomeError, ControlError) as error:
            return self._form(request, values, error=str(error))
        self._watch.soon()
        return RedirectResponse("/", 303)

    def _submit(self, form: FormData, values: dict[str, str], *, by: str) -> None:
        rounds, seed = (_whole(values, key, none) for key, none in (("rounds", 0), ("seed", -1)))
        options: dict[str, Any] = {"again": "again" in form, "rounds": max(0, rounds), "seed": max(-1, seed)}
        studies = Studies(self._server, by=by)
        if values["bundled"]:
            if values["bundled"] not in study_names():
                raise ServerHomeError(
                    f"no study '{values['bundled']}' comes with FedSigma: choose one of the list"
                )
            studies.submit(values["bundled"], **options)
        elif values["text"]:
            with TemporaryDirectory(prefix="fedsigma-") as folder:
                file = Path(folder) / "study.yaml"
                file.write_text(values["text"], encoding="utf-8")
                studies.submit(str(file), **options)
        else:
            raise ServerHomeError("no study was named: choose one, or paste a study file")

    async def stop(self, request: Request) -> Response:
        """Stop a run."""
        return await self._act(request, Studies.stop)

    async def resume(self, request: Request) -> Response:
        """Go on with a run."""
        return await self._act(request, Studies.resume)

    async def _act(self, request: Request, act: Callable[[Studies, str], Any]) -> Response:
        line = await run_in_threadpool(self._desk.library.line, request.path_params["key"])
        try:
            studies = Studies(self._server, by=request.state.user.name)
            await run_in_threadpool(act, studies, line.run_id)
        except (ServerHomeError, ControlError) as error:
            values = {"title": "That did not work", "words": str(error)}
            return self._desk.page(request, "error.html", status=409, **values)
        self._watch.soon()
        return RedirectResponse(f"/runs/{line.key}" if line.begun else "/", 303)


def _whole(values: dict[str, str], key: str, none: int) -> int:
    try:
        return int(values[key] or none)
    except ValueError:
        raise ServerHomeError(f"{key} is '{values[key]}', expected a whole number") from None
