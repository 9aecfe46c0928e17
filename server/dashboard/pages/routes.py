"""The addresses of the dashboard, and what answers at each."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, DictLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedsigma.common import __version__
from fedsigma.server.dashboard.pages.compare import compare_view
from fedsigma.server.dashboard.pages.prometheus import RunCollector, metrics_page
from fedsigma.server.dashboard.pages.run_index import RunIndex, RunLine, UnknownRun
from fedsigma.server.dashboard.pages.run_view import Sections, list_view, run_view
from fedsigma.server.report.style import CHOSEN_SCHEMES, SCHEMES
from fedsigma.server.report.template import TABLE

__all__ = ["DashboardContext", "make_pages"]

HERE = Path(__file__).parents[1]
FLUSH = "end of the head"
KINDS = {".css": "text/css", ".js": "text/javascript"}


class DashboardContext:
    """What all pages share.

    Args:
        library: the runs.
        pages: addresses and names for the bar at the top.
    """

    def __init__(self, library: RunIndex, pages: tuple[tuple[str, str], ...]) -> None:
        self.library = library
        self.pages = pages
        self._views: dict[str, tuple[tuple[Any, ...], Sections]] = {}
        loader = ChoiceLoader([FileSystemLoader(HERE / "templates"), DictLoader({"grids.html": TABLE})])
        self._environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._environment.globals |= {"asset": asset, "version": __version__}

    def text(self, request: Request, template: str, **values: Any) -> str:
        """A template as HTML; all text from runs and studies is escaped."""
        return "".join(self._template(request, template, values))

    def _template(self, request: Request, template: str, values: dict[str, Any]) -> Iterator[str]:
        server = self.library.server
        shared = {
            "user": request.state.user,
            "pages": self.pages,
            "here": request.url.path,
            "server_name": server.config.name if server else "",
            "flush": "",
            "may_operate": self.may_operate(request),
        }
        return self._environment.get_template(template).generate(**(shared | values))

    def ready(self) -> None:
        """Have all templates compiled, which takes a moment."""
        for name in self._environment.list_templates():
            self._environment.get_template(name)

    def streamed(self, request: Request, template: str, **values: Any) -> Response:
        """A page whose head is sent before the rest is known, so that a browser fetches scripts meanwhile."""
        pieces = self._template(request, template, values | {"flush": FLUSH})

        def parts() -> Iterator[str]:
            held: list[str] = []
            for piece in pieces:
                if piece == FLUSH:
                    yield "".join(held)
                    held = []
                else:
                    held.append(piece)
            yield "".join(held)

        return StreamingResponse(parts(), media_type="text/html")

    def page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A whole page."""
        return HTMLResponse(self.text(request, template, **values), status_code=status)

    def may_operate(self, request: Request) -> bool:
        """Whether this user may start, stop and go on with studies here."""
        user = request.state.user
        return self.library.server is not None and user is not None and user.role == "operator"

    def sections(self, line: RunLine) -> tuple[str, Sections]:
        """A run's page and a tag that changes with it; what has not changed is not made again.

        Raises:
            UnknownRun: there is no such run.
        """
        folder = self.library.run(line.key)
        state = (folder.state, line.run.state)
        known = self._views.get(line.key)
        if known is None or known[0] != state:
            known = self._views[line.key] = (state, run_view(folder, line))
            while len(self._views) > 8:
                del self._views[next(iter(self._views))]
        return tag_of(repr(state)), known[1]


@cache
def static(name: str) -> tuple[bytes, bytes, str]:
    """A file of the pages: its content, the same compressed, and a version that changes with it.

    Raises:
        FileNotFoundError: there is none of this name.
    """
    known = {path.name: path for path in (HERE / "static").iterdir()}
    if name not in known:
        raise FileNotFoundError(name)
    content = known[name].read_bytes()
    if name == "app.css":
        content = (SCHEMES + CHOSEN_SCHEMES).encode() + content
    return content, gzip.compress(content, 6), hashlib.sha256(content).hexdigest()[:12]


def asset(name: str) -> str:
    """The address of a file of the pages."""
    return f"/static/{name}?v={static(name)[2]}"


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    try:
        content, small, _ = static(name)
    except FileNotFoundError:
        raise HTTPException(404) from None
    headers = {"Vary": "Accept-Encoding"}
    # Addresses without their version are those that scripts import; they are asked for again each time.
    headers["Cache-Control"] = "private, max-age=31536000, immutable" if request.query_params else "no-cache"
    if "gzip" in request.headers.get("accept-encoding", ""):
        content, headers["Content-Encoding"] = small, "gzip"
    return Response(content, media_type=KINDS[Path(name).suffix], headers=headers)


def make_pages(desk: DashboardContext, more: list[Route], *, lifespan: Any = None) -> Starlette:
    """The app, without the guard that has to stand before it.

    Args:
        desk: what the pages share.
        more: routes of a server.
        lifespan: Starlette's.
    """
    routes = [
        Route("/", _page(desk, _runs)),
        Route("/state", _page(desk, _runs_state)),
        Route("/runs/{key:path}", _page(desk, _run)),
        Route("/state/{key:path}", _page(desk, _run_state)),
        Route("/report/{key:path}", _page(desk, _report)),
        Route("/compare", _page(desk, _compare)),
        Route("/models", _page(desk, _models)),
        Route("/models/{reference}", _page(desk, _model)),
        Route("/static/{name}", _static),
        Route("/health", _health),
        Route("/metrics", _metrics(desk)),
        *more,
    ]

    async def failed(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        title = {404: "Not here", 403: "Not allowed"}.get(status, "That did not work")
        words = {404: "There is no such page, or the run has been removed."}.get(status, "")
        words = words or (error.detail if isinstance(error, HTTPException) else "")
        return desk.page(request, "error.html", status=status, title=title, words=words)

    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: failed, UnknownRun: failed}
    )


def _page(
    desk: DashboardContext, work: Callable[[DashboardContext, Request], Response]
) -> Callable[[Request], Any]:
    """An endpoint whose work, which reads files, is done in a thread."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(work, desk, request)

    return endpoint


async def _health(request: Request) -> Response:
    return PlainTextResponse("ok\n")


def _metrics(desk: DashboardContext) -> Callable[[Request], Any]:
    collector = RunCollector(desk.library.figures)

    async def endpoint(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        content, kind = await run_in_threadpool(metrics_page, collector, accept=accept)
        return Response(content, headers={"Content-Type": kind})

    return endpoint


def _runs(desk: DashboardContext, request: Request) -> Response:
    return desk.page(request, "runs.html", **_listed(desk, request))


def _listed(desk: DashboardContext, request: Request) -> dict[str, Any]:
    return {
        "runs": list_view(desk.library),
        "place": desk.library.runs.name,
        "may_start": desk.may_operate(request),
    }


def _runs_state(desk: DashboardContext, request: Request) -> Response:
    text = desk.text(request, "runs_list.html", **_listed(desk, request))
    return told(request, tag_of(text), {"parts": {"live": text}})


def tag_of(text: str) -> str:
    """A short text that changes with this one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def told(request: Request, tag: str, values: dict[str, Any]) -> Response:
    """A part of a page for its script, or the word that it is as it was."""
    headers = {"ETag": f'"{tag}"', "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    content = json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
    if "gzip" in request.headers.get("accept-encoding", ""):
        content, headers["Content-Encoding"] = gzip.compress(content, 1), "gzip"
    return Response(content, media_type="application/json", headers=headers)


def _run(desk: DashboardContext, request: Request) -> Response:
    line = desk.library.line(request.path_params["key"])
    desk.library.run(line.key)

    def read() -> dict[str, Any]:
        found = desk.sections(line)[1]
        return {"view": found.view, "charts": _embedded(found)}

    return desk.streamed(request, "run.html", name=line.run.study, actions=_actions(line), read=read)


def _embedded(found: Sections) -> Markup:
    """Series as JSON within a page, which nothing in them can end."""
    return Markup(json.dumps(found.charts, separators=(",", ":")).replace("<", "\\u003c"))


def _actions(line: RunLine) -> list[tuple[str, dict[str, str]]]:
    if not line.run_id:
        return []
    stop = {"button": "Stop", "ask": "Stop this run? What it has done stays, and it can be gone on with."}
    go_on = {"button": "Go on", "ask": "Go on with this run where it ended?"}
    return {
        "queued": [("stop", stop)],
        "running": [("stop", stop)],
        "interrupted": [("stop", stop), ("resume", go_on)],
        "failed": [("resume", go_on)],
    }.get(line.run.state, [])


def _run_state(desk: DashboardContext, request: Request) -> Response:
    line = desk.library.line(request.path_params["key"])
    tag, found = desk.sections(line)
    if request.headers.get("if-none-match") == f'"{tag}"':
        return told(request, tag, {})
    values = {"view": found.view, "actions": _actions(line)}
    names = ("head", "actions", "tables")
    parts = {name: desk.text(request, f"run_{name}.html", **values) for name in names}
    return told(request, tag, {"parts": parts, "charts": found.charts})


def _report(desk: DashboardContext, request: Request) -> Response:
    path = desk.library.run(request.path_params["key"]).report_path
    if not path.is_file():
        raise HTTPException(404)
    # A report has its style inline and no script; in a sandbox it can do nothing in the dashboard's name.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": policy})


def _compare(desk: DashboardContext, request: Request) -> Response:
    runs = [row for row in list_view(desk.library) if row["begun"]]
    chosen = (request.query_params.getlist("run") + [row["key"] for row in runs] + ["", ""])[:2]
    if not all(chosen):
        return desk.page(request, "compare.html", runs=runs, chosen=chosen, view=None, charts="")
    found = compare_view(*(desk.library.run(key) for key in chosen))
    shown: dict[str, Any] = {"view": found.view, "charts": _embedded(found)}
    return desk.page(request, "compare.html", runs=runs, chosen=chosen, **shown)


def _models(desk: DashboardContext, request: Request) -> Response:
    from fedsigma.server.dashboard.pages.models import model_rows

    rows, problems = model_rows(desk.library.shelf)
    return desk.page(request, "models.html", models=rows, problems=problems)


def _model(desk: DashboardContext, request: Request) -> Response:
    from fedsigma.common.registry import ModelError
    from fedsigma.server.dashboard.pages.models import card

    reference = request.path_params["reference"]
    try:
        shown = card(desk.library.shelf, reference)
    except ModelError:
        raise HTTPException(404) from None
    return desk.page(request, "model.html", reference=reference, card=shown)
