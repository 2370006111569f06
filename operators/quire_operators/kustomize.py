"""Overlays: what `kustomize build` makes of a folder of a repository, or `kubectl kustomize`, which is the same.

The command needs files, so those of the commit that it may read (YAML and JSON) are written into a folder that
lives as long as the build: by us, as plain files, under names that lead nowhere else. It runs with nothing of our
environment: no other command in its PATH, no home, and a proxy that is not there in place of the network; what of
a kustomization names an address is refused before. Time and output are bounded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from quire_operators.bounded import Bounds, TooLong, TooMuch, run
from quire_operators.git import Limits, Refused, Repository
from quire_operators.status import Reason
from quire_schemas.yaml_tree import MAX_BYTES, Node, compose

COMMANDS = (("kustomize", "build"), ("kubectl", "kustomize"))
"""What builds a folder, given its name; the first that there is."""
NAMES = ("kustomization.yaml", "kustomization.yml", "Kustomization")
SUFFIXES = (b".yaml", b".yml", b".json", b"/Kustomization")
PLUGINS = (
    "generators",
    "transformers",
    "validators",
    "helmCharts",
    "helmChartInflationGenerator",
    "openapi",
    "crds",
)
"""Fields of a kustomization whose files could name an address in ways of their own."""
INERT = ("patch", "literals", "commonLabels", "commonAnnotations", "labels", "images")
"""Fields of a kustomization whose text is taken as it stands: an address in it is never asked."""
NOWHERE = "http://127.0.0.1:9"
WORDS = 600


def is_overlay(paths: list[bytes]) -> bool:
    """Whether a folder with these files is one for kustomize."""
    return any(name.encode() in paths for name in NAMES)


async def build(
    repository: Repository, commit: str, path: str, scratch: Path, environ: Mapping[str, str], limits: Limits
) -> bytes:
    """The documents that the folder of the commit stands for. `scratch` is a folder to build in. Raises
    `GitError`."""
    found = ((shutil.which(name, path=environ.get("PATH", os.defpath)), verb) for name, verb in COMMANDS)
    command = next(([program, verb] for program, verb in found if program is not None), None)
    if command is None:
        text = f"{path} has a kustomization, and there is no kustomize or kubectl in the control plane's PATH"
        hint = "install it there, or apply what it makes: kustomize build FOLDER | platform apply -f -"
        raise Refused(Reason.KUSTOMIZE_FAILED, text, hint)
    entries = [
        entry
        for entry in await repository.tree(commit, ".")
        if entry.is_file and entry.size <= MAX_BYTES and (b"/" + entry.path).endswith(SUFFIXES)
    ]
    contents = await repository.blobs(entries)
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="build-") as name:
        root = Path(name)
        (root / "home").mkdir()
        tree = root / "tree"
        for entry, content in zip(entries, contents, strict=True):
            parts = entry.path.split(b"/")
            if any(part in (b"", b".", b"..", b".git") for part in parts):
                raise _failed(f"{entry.path!r} is no path of a file", "remove it from the repository")
            if parts[-1].decode(errors="replace") in NAMES:
                refuse_addresses(os.fsdecode(entry.path), content)
            file = tree / os.fsdecode(entry.path)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as opened:
                    opened.write(content)
            except OSError as error:
                raise _failed(f"{entry.path!r}: {error.strerror}", "is it in the repository twice?") from error
        return await _run(command, tree, path, root / "home", limits)


def refuse_addresses(name: str, content: bytes) -> None:
    """Nothing of a kustomization may lead to the network: kustomize would ask a server of this machine past any
    proxy. Raises `Refused`."""
    nodes, flaws = compose(content.decode(errors="replace"))
    if flaws:
        raise _failed(f"{name}:{flaws[0].line}:{flaws[0].column}: {flaws[0].message}", flaws[0].hint)
    for key in (key for node in nodes for key, _ in node.entries if key.text in PLUGINS):
        why = f"{key.text} is refused: it runs or loads what a build here does not"
        raise _failed(f"{name}:{key.line}:{key.column}: {why}", "resources and patches will do")
    for found in (each for node in nodes for each in _texts(node)):
        if "://" in found.text or found.text.startswith(("git@", "github.com/", "git::")):
            why = f"{found.text[:120]!r} is refused: it names an address, and a build has no network"
            hint = "a build sees the repository alone: have a copy in it"
            raise _failed(f"{name}:{found.line}:{found.column}: {why}", hint)


def _texts(node: Node) -> Iterator[Node]:
    """All texts that kustomize could load from."""
    if node.kind == "scalar":
        yield node
    for item in node.items:
        yield from _texts(item)
    for key, value in node.entries:
        yield from _texts(key)
        if key.text not in INERT:
            yield from _texts(value)


async def _run(command: Sequence[str], tree: Path, path: str, home: Path, limits: Limits) -> bytes:
    """What the command makes of the folder `path` of the tree. What it says of files is told by their paths in the
    repository."""
    closed = {
        "PATH": str(home),
        "HOME": str(home),
        "TMPDIR": str(home),
        "LC_ALL": "C.UTF-8",
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE),
    }
    bounds = Bounds(limits.seconds, MAX_BYTES)
    try:
        code, out, said = await run([*command, str(tree / path)], closed, home, bounds)
    except TooLong as error:
        raise _failed(
            f"it took longer than {limits.seconds:g} s", "kustomize build FOLDER in a checkout"
        ) from error
    except TooMuch as error:
        raise _failed("what it makes is larger than 1 MiB", "make two sources of it") from error
    if code != 0:
        words = in_repository(" ".join(said.decode(errors="replace").split()), tree)
        raise _failed(
            f"{path}: {words[:WORDS] or f'it ended with {code}'}",
            "kustomize build FOLDER in a checkout shows the same",
        )
    return out


def in_repository(words: str, tree: Path) -> str:
    """The words with each path in the tree as that in the repository."""
    for place in sorted({str(tree.resolve()), str(tree)}, key=len, reverse=True):  # one may be the other's tail
        words = words.replace(f"{place}/", "").replace(place, ".")
    return words


def _failed(message: str, hint: str) -> Refused:
    return Refused(Reason.KUSTOMIZE_FAILED, f"kustomize: {message}", hint)
