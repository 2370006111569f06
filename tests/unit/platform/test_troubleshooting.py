"""docs/troubleshooting.md has an entry for every code and reason that a user can meet, and none for others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from quire import controlplane
from quire.errors import TABLE
from quire_operators.status import ADVICE

DOCS = Path(__file__).resolve().parents[3] / "docs"
ENTRY = re.compile(r"\*\*`([A-Za-z_]+)`\*\*")


def entries(section: str) -> list[str]:
    """The words in bold that entries of a section begin with."""
    text = (DOCS / "troubleshooting.md").read_text()
    body = text.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in body.splitlines() if line.startswith("- **")]
    return [word for line in lines for word in ENTRY.findall(line)]


def admin_codes() -> set[str]:
    """Every code with which the control plane's API raises or answers an `ApiError`."""
    found = set()
    folder = Path(next(iter(controlplane.__path__)))
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                code = node.args[1]
                if isinstance(code, ast.Constant):
                    found.add(str(code.value))
    return found


FOUND = {
    "A command fails": admin_codes(),
    "A model does not get ready": {str(reason) for reason in ADVICE},
    "A request is refused": {row.code or row.type for row in TABLE.values()},
}


@pytest.mark.parametrize("section", FOUND)
def test_every_word_that_is_shown_has_its_entry_and_no_entry_is_stale(section: str) -> None:
    listed = entries(section)
    assert len(listed) == len(set(listed)), "two entries for one word"
    assert len(FOUND[section]) > 8, "the search finds nothing any more"
    assert set(listed) == FOUND[section], f"docs/troubleshooting.md, section {section!r}"


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
