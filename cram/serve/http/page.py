"""The page at `/`: plain HTML, CSS and JavaScript from this package, and the examples that it offers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page_files"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/routing.js": "routing.js"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The page loads nothing from elsewhere, runs no inline script and cannot be framed.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Example:
    """A question that the page offers.

    Attributes:
        task: Name of the task that it belongs to.
        question: What is asked.
        image: The picture that it is about.
    """

    task: str
    question: str
    image: Image.Image


class Page:
    """The routes of the page.

    Args:
        examples: The questions that it offers.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._files = {path: (FOLDER / name).read_bytes() for path, name in FILES.items()}
        self._examples = [
            {"task": each.task, "question": each.question, "image": _data_url(each.image)}
            for each in examples
        ]

    def routes(self) -> list[Route]:
        """The routes."""
        pages = [Route(path, self.file, methods=["GET"]) for path in FILES]
        return [*pages, Route("/v1/cram/examples", self.examples, methods=["GET"])]

    async def file(self, http: Request) -> Response:
        """One of the page's files."""
        path = http.url.path
        kind = KINDS[Path(FILES[path]).suffix]
        return Response(self._files[path], media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    async def examples(self, http: Request) -> Response:
        """The examples, each with its picture as a data URL."""
        return JSONResponse({"object": "list", "data": self._examples})


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
