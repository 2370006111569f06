"""The page's files. What a browser may ask for is a table of names, not a folder: no path leads anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent / "page"
_HTML, _CSS, _SVG = "text/html; charset=utf-8", "text/css; charset=utf-8", "image/svg+xml"
_SCRIPT = "text/javascript; charset=utf-8"
_SCRIPTS: Final = (
    "app", "charts", "dom", "events", "gateway", "link", "model", "overview", "parts", "playground", "source",
    "theme", "words",
)  # fmt: skip
FILES: Final = {
    "/": ("index.html", _HTML),
    "/style.css": ("style.css", _CSS),
    "/icon.svg": ("icon.svg", _SVG),
    **{f"/{name}.js": (f"{name}.js", _SCRIPT) for name in _SCRIPTS},
}
"""Path -> the file's name, and what it is."""


def load() -> dict[str, tuple[bytes, str]]:
    """Path -> a file's bytes and its media type. Read as a whole: an upgrade must not change half a page."""
    return {path: ((_HERE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
