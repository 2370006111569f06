"""The page of threats cannot rot: every file and every test that it names is there, and no threat is missing.
Besides, what of it can be seen in the source.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples
from tests.test_house import PYTHON_FILES, ROOT

from quire_operators.secrets import SecretNotFound, Secrets
from quire_schemas.checkpoint_files import InvalidConfig, read_index

PAGE = (ROOT / "docs" / "security.md").read_text()
ROW = re.compile(r"^\| (T\d+) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
QUOTED = re.compile(r"`([^`]+)`")


def rows() -> list[tuple[str, str, str]]:
    """Number, files and tests of each threat."""
    return [(number, where, tests) for number, _, _, where, tests in ROW.findall(PAGE)]


def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_threat_has_its_row() -> None:
    assert [number for number, _, _ in rows()] == [f"T{number}" for number in range(1, 32)]


@pytest.mark.parametrize(("number", "where", "tests"), rows(), ids=lambda value: value if value[0] == "T" else "")
def test_every_file_and_every_test_of_a_row_is_there(number: str, where: str, tests: str) -> None:
    files, named = QUOTED.findall(where), QUOTED.findall(tests)
    assert files, number
    assert named, number
    for file in files:
        assert (ROOT / file).is_file(), f"{number}: {file}"
    for name in named:
        file, _, function = name.partition("::")
        assert function.startswith("test_"), f"{number}: {name}"
        assert (ROOT / file).is_file(), f"{number}: {file}"
        found = functions(ROOT / file).get(function)
        assert found is not None, f"{number}: {name} is not there"
        marks = " ".join(ast.unparse(mark) for mark in found.decorator_list)
        assert "xfail" not in marks, name
        assert not re.search(r"mark\.skip\b", marks), name


def test_every_test_that_the_page_on_git_names_is_there() -> None:
    shown = (ROOT / "docs" / "gitops.md").read_text().partition("## What shows it")[2]
    named = re.findall(r"^\| .+ \| `(.+)::(.+)` \|$", shown, re.MULTILINE)
    assert len(named) == shown.count("\n| ") - 1, "each row but the head names one"
    for file, function in named:
        assert function in functions(ROOT / "tests" / file), f"{file}::{function}"


def test_the_page_is_found_from_the_readme() -> None:
    assert "docs/security.md" in (ROOT / "README.md").read_text()


# ── what can be seen in the source ────────────────────────────────────────────────────────────────────────

SECRET = re.compile(r"(secret|password|digest|sha256|token_hash|presented|bearer|api_key)$")
NO_SECRETS = {
    "self._hash.hexdigest() == self._file.digest": "of a file that was downloaded",
    "(source is None) == (digest is None)": "whether there is one",
    "digest_of(folder) != adapter.digest": "of a folder that a manifest names",
    "known.digest != each.digest": "of a folder that a manifest names",
}


@functools.cache
def sources() -> list[tuple[Path, list[ast.Compare], list[ast.Call], set[str]]]:
    """Each file of the product, its comparisons, its calls, and what it imports: one walk for all that look."""
    found = []
    for path in PYTHON_FILES:
        compared: list[ast.Compare] = []
        called: list[ast.Call] = []
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared.append(node)
            elif isinstance(node, ast.Call):
                called.append(node)
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
        found.append((path, compared, called, imported))
    return found


def last_name(node: ast.expr) -> str:
    """What an expression is called: the `c` of `a.b.c`, `a.c()` and `a["c"]`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=func):
            return last_name(func)
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            return key
    return ""


def test_no_secret_is_compared_by_equals() -> None:
    found = []
    for path, comparisons, _, _ in sources():
        for node in comparisons:
            if not any(isinstance(each, ast.Eq | ast.NotEq) for each in node.ops):
                continue
            named = any(SECRET.search(last_name(side)) for side in (node.left, *node.comparators))
            if named and ast.unparse(node) not in NO_SECRETS:
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert found == [], "hmac.compare_digest is for these"


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path, _, found, _ in sources():
        yield from ((path, call) for call in found)


def test_nothing_goes_through_a_shell() -> None:
    shells = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
    for path, call in calls():
        assert ast.unparse(call.func) not in shells, f"{path}:{call.lineno}"
        assert all(word.arg != "shell" for word in call.keywords), f"{path}:{call.lineno}"
        assert "create_subprocess_shell" not in ast.unparse(call.func), f"{path}:{call.lineno}"


def test_no_weak_hash_is_used_but_where_git_asks_for_one() -> None:
    weak = [
        f"{path.name}: {ast.unparse(call)}"
        for path, call in calls()
        if re.search(r"\b(md5|sha1|crc32|adler32)$", ast.unparse(call.func))
        or (ast.unparse(call.func) == "hash" and "quire_engine" in path.as_posix())
    ]
    assert all("usedforsecurity=False" in each for each in weak), weak
    assert len(weak) == 1


def test_nothing_that_decodes_media_is_imported() -> None:
    media = {"PIL", "cv2", "torchvision", "torchaudio", "av", "imageio", "soundfile", "librosa", "wave", "decord"}
    archives = {"zipfile", "tarfile", "gzip", "bz2", "lzma", "zlib", "zstandard", "brotli", "xml", "lxml"}
    for path, _, _, imported in sources():
        assert not imported & media, path
        if "router" in path.parts or "quire_schemas" in path.parts:
            assert not imported & archives, f"{path}: what clients send is not unpacked"


# ── names that become paths ───────────────────────────────────────────────────────────────────────────────

PIECES = (
    "..", ".", "/", "\\", "\0", "%2e%2e", "%2f", "~", "a", "model", ".safetensors", "\n", "‥", "∕", "a" * 300, " ",
    "C:",
)  # fmt: skip
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


@settings(max_examples=examples(40))
@given(name=NAMES)
def test_a_name_is_no_way_out_of_its_folder(name: str) -> None:
    """A secret's, and that of a shard: it is taken and leads inside, or it is refused."""
    with tempfile.TemporaryDirectory() as made:
        inside = Path(made) / "state" / "inside"
        inside.mkdir(parents=True)
        (inside.parent / "model.safetensors").write_text("precious")
        before = {path for path in Path(made).rglob("*") if not path.is_relative_to(inside)}
        with contextlib.suppress(SecretNotFound):
            Secrets(inside, {}).put(name, "value")
            assert (inside / name).read_text() == "value"
        assert {path for path in Path(made).rglob("*") if not path.is_relative_to(inside)} == before
        index = inside / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with contextlib.suppress(InvalidConfig):
            for shard in read_index(index).values():
                assert (inside / shard).resolve().parent == inside.resolve()
