"""What a release is made of: locks that agree with `pyproject.toml` and name nothing but pins by hash, the list of
what is in them for machines, and by night an installation from nothing but these.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from release import locks, sbom

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(each) for each in PROJECT["dependencies"]]
HASH = "--hash=sha256:" + "0" * 64


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = sbom.pinned()
    assert len(NEEDED) > 20
    for needed in NEEDED:
        found = [pin for pin in pins if pin.name == canonicalize_name(needed.name)]
        assert found, f"{needed}: run make lock"
        for pin in found:
            assert needed.specifier.contains(pin.version), f"{needed}: {pin.version} is pinned; run make lock"
            if pin.marker:
                Marker(pin.marker)


def test_the_locks_are_whole_and_torch_is_apart() -> None:
    runtime, torch = (locks.read(path.read_text()) for path in (locks.RUNTIME, locks.TORCH))
    names = {pin.name for pin in (*runtime, *torch)} | {"quire"}
    for pin in (*runtime, *torch):
        assert pin.via <= names, pin.name
        assert pin.via, f"nobody needs {pin.name}"
    assert {pin.name for pin in torch} == locks.of_torch([*runtime, *torch])
    assert not {pin.name for pin in runtime} & {"torch", "triton"}
    assert "litellm" not in names, "a peer of the benchmarks, and nothing that a release runs on"
    assert not [pin.name for pin in (*runtime, *torch) if "+" in pin.version], (
        "a build that the index does not have"
    )


@pytest.mark.parametrize("path", [locks.RUNTIME, locks.TORCH], ids=lambda path: path.name)
def test_a_lock_is_as_it_is_written_and_names_no_index_and_no_path(path: Path) -> None:
    text = path.read_text()
    assert text == locks.HEADS[path] + "".join(pin.lines() for pin in locks.read(text))
    pins = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not [line for line in pins if "/" in line or "@" in line or line.startswith(("-", "."))]


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.org/simple",
        "--extra-index-url https://example.org/simple",
        "--find-links ./wheels",
        "-e .",
        "-r other.txt",
        f"a @ https://example.org/a.whl {HASH}",
        f"./a.whl {HASH}",
        f"a>=1 \\\n    {HASH}",
        "a==1",
        "a==1 \\\n    --hash=md5:00",
        f"a==1 \\\n    {HASH}\n    --pre",
    ],
)
def test_what_is_no_pin_by_hash_is_no_lock(line: str) -> None:
    with pytest.raises(locks.BadLock):
        locks.read(f"b==2 \\\n    {HASH}\n    # via quire\n{line}\n")


def test_the_list_for_machines_has_every_pin_and_is_always_the_same() -> None:
    pins = sbom.pinned()
    text = sbom.made(pins)
    assert text == sbom.made(pins)
    few = sbom.made(replace(pin, via=frozenset({"quire"})) for pin in pins if pin.name in ("uvicorn", "h11"))
    sbom.check(few)
    with pytest.raises(sbom.BadSbom):
        sbom.check(few.replace('"library"', '"librarian"', 1))
    found = json.loads(text)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["metadata"]["component"]["purl"] == f"pkg:pypi/quire@{PROJECT['version']}"
    listed = {
        (
            part["name"],
            part["version"],
            frozenset(each["content"] for ref in part["externalReferences"] for each in ref["hashes"]),
        )
        for part in found["components"]
    }
    assert listed == {(pin.name, pin.version, frozenset(pin.hashes)) for pin in pins}
    uses = {each["ref"]: set(each.get("dependsOn", ())) for each in found["dependencies"]}
    assert {each.partition("@")[0] for each in uses["quire"]} == {canonicalize_name(each.name) for each in NEEDED}
    assert any(each.startswith("h11@") for each in uses[next(ref for ref in uses if ref.startswith("uvicorn@"))])
    assert "://" not in text.replace("http://cyclonedx.org", ""), "it names no index"


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.nightly
def test_a_wheel_is_installed_by_the_lock_alone_and_works(tmp_path: Path) -> None:
    """All but torch, which the command, the control plane and the router do not load."""
    pip = ("-m", "pip", "--disable-pip-version-check", "-q")
    run(sys.executable, *pip, "wheel", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("quire-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert not [name for name in names if name.endswith(".pth") or "/tests/" in name or name.startswith("release")]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, *pip, "install", "--require-hashes", "--only-binary", ":all:", "-r", locks.RUNTIME, cwd=tmp_path)
    run(python, *pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    assert {path.name for path in site.glob("*.pth")} <= {"distutils-precedence.pth"}, (
        "code that runs at every start"
    )
    command = python.with_name("platform")
    assert PROJECT["version"] in run(command, "version", cwd=tmp_path)
    run(command, "validate", ROOT / "manifests", cwd=tmp_path)
    run(python, "-c", "import quire.router.app, quire.controlplane.app, quire_operators.fetch", cwd=tmp_path)
