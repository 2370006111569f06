"""What the product shows of itself to its neighbours on a machine, and what it does not do with what it is given.

A whole platform with a real engine, which serves a model out of a folder that is full of traps: Python files under
every name that something might import. It is looked at from outside: its sockets, its files, another user's eyes.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.e2e.conftest import Platform

from quire import builtin

pytestmark = pytest.mark.nightly
SPRUNG = "import pathlib; pathlib.Path({path!r}).write_text(__name__)\n"
NAMES = (
    "__init__", "modeling_tiny", "configuration_tiny", "tokenization_tiny", "processing_tiny", "custom_generate",
    "torch", "numpy", "json", "quire", "quire_engine", "tokenizers", "transformers", "safetensors", "conftest",
    "sitecustomize", "usercustomize", "setup",
)  # fmt: skip
TRAPPED = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: trapped}}
spec:
  source: file://{folder}
  engine: {{maxModelLen: 512, kvCache: {{size: 16Mi}}}}
  resources: {{cpu: 1}}
"""
CANARY = "CANARY"
NOBODY = 65534


@pytest.fixture(scope="module")
def sprung(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trap leaves behind."""
    return tmp_path_factory.mktemp("traps") / "sprung"


@pytest.fixture(scope="module")
def served(shared_platform: Platform, sprung: Path) -> Platform:
    """A platform that serves `trapped`; traps lie where its commands and its processes run, too."""
    folder = shared_platform.root / "model"
    shutil.copytree(builtin.path("tiny"), folder)
    shared_platform.state.root.mkdir(mode=0o700)
    for place in (folder, shared_platform.root, shared_platform.state.root):
        for name in NAMES:
            (place / f"{name}.py").write_text(SPRUNG.format(path=str(sprung)))
        (place / "trap.pth").write_text(SPRUNG.format(path=str(sprung)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "custom_generate": "custom_generate.py"}))
    shared_platform.run(
        "apply", shared_platform.gateway, shared_platform.write("trapped.yaml", TRAPPED.format(folder=folder))
    )
    return shared_platform


def send(base: str, path: str, body: dict[str, Any] | None, **headers: str) -> tuple[int, bytes]:
    """One request, and what came of it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_code_beside_a_model_or_where_somebody_stands_is_run(served: Platform, sprung: Path) -> None:
    status, answer = send(served.base_url("trapped"), "/chat/completions", {
        "model": "trapped", "messages": [{"role": "user", "content": "What is paging?"}], "max_tokens": 8,
    })  # fmt: skip
    assert status == 200, answer
    assert not sprung.exists(), sprung.read_text()
    trap = subprocess.run([sys.executable, "-c", "import quire_engine"], cwd=served.root, check=False)
    assert trap.returncode == 0
    assert sprung.read_text() == "quire_engine", "the traps work"
    sprung.unlink()


def test_code_that_a_model_asks_for_is_refused_by_name(served: Platform, sprung: Path) -> None:
    folder = served.root / "asking"
    shutil.copytree(served.root / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tiny.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = TRAPPED.format(folder=folder).replace("trapped", "asking")
    said = served.run("apply", served.write("asking.yaml", manifest), code=3).stderr
    assert "auto_map" in said
    assert not sprung.exists()


def listening(process: psutil.Process) -> list[Any]:
    return [each for each in process.net_connections(kind="inet") if each.status == psutil.CONN_LISTEN]


def test_only_the_router_can_be_reached_over_a_network(served: Platform) -> None:
    port = int(served.base_url("trapped").rpartition(":")[2].partition("/")[0])
    engines = 0
    for process in served.processes():
        words = " ".join(process.cmdline())
        engines += "quire_engine" in words
        found = {(each.laddr.ip, each.laddr.port) for each in listening(process)}
        if "quire.router" in words or ("shim.py" in words and "router" in words):
            assert found == {("127.0.0.1", port)}, words
        else:
            assert found == set(), words
        if "quire_engine" in words:
            assert process.net_connections(kind="inet") == [], "not even to somebody"
    assert engines == 1


def everything(served: Platform) -> list[Path]:
    """Each folder, file and socket of the platform. It lives, so some come and go."""
    return [path for root in (served.state.root, served.state.runtime) for path in [root, *root.rglob("*")]]


def test_what_is_on_disk_is_its_users_alone(served: Platform) -> None:
    found = {}
    for path in everything(served):
        try:
            found[path] = path.lstat()
        except FileNotFoundError:
            continue
    assert sum(stat.S_ISSOCK(each.st_mode) for each in found.values()) >= 5
    ours = {path: each for path, each in found.items() if path.suffix not in (".py", ".pth")}
    assert {each.st_uid for each in ours.values()} == {os.geteuid()}
    opened = [
        f"{stat.filemode(each.st_mode)} {path}"
        for path, each in ours.items()
        if each.st_mode & 0o077
        and (path in (served.state.root, served.state.runtime) or stat.S_ISSOCK(each.st_mode))
    ]
    assert opened == []
    secret = [path for path in ours if path.suffix in (".db", ".json", ".sock", ".snapshot", ".log", ".lock")]
    assert len(secret) > 10
    assert [f"{stat.filemode(ours[path].st_mode)} {path}" for path in secret if ours[path].st_mode & 0o077] == []


LOOK = """
import json, os, socket, sys
opened = []
for path in json.load(sys.stdin):
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        opened.append(path)
    except OSError:
        pass
    try:
        opened.append((path, len(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read())))
    except OSError:
        pass
print(json.dumps([os.geteuid(), opened]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look with another user's eyes")
def test_another_user_can_open_none_of_it(served: Platform) -> None:
    paths = [str(path) for path in everything(served)]
    assert len(paths) > 20
    # down to the folders themselves anybody may come: it is they that keep others out
    for folder in (served.state.root, served.state.runtime):
        for above in folder.parents:
            if above.is_relative_to("/tmp") and above != Path("/tmp"):
                above.chmod(0o755)
    seen = subprocess.run(
        ["/usr/bin/env", "python3", "-c", LOOK],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        check=False,
    )
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout) == [NOBODY, []]


def test_what_was_asked_and_answered_is_kept_nowhere(served: Platform) -> None:
    """Prompts and answers, of requests that succeed and of those that fail: in no log, no file, no metric."""
    said = f"{CANARY}-PROMPT"
    turns = [{"role": "system", "content": said}, {"role": "user", "content": said}]
    root = served.base_url("trapped").removesuffix("/v1")
    good: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": turns, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": turns, "max_tokens": 4, "stream": True, "user": said}),
        ("/v1/completions", {"prompt": said, "max_tokens": 4, "logprobs": 1, "echo": True}),
        ("/v1/messages", {"messages": turns[1:], "system": said, "max_tokens": 4}),
        ("/v1/responses", {"input": said, "max_output_tokens": 4, "store": False}),
        ("/v1/embeddings", {"input": [said]}),
        ("/v1/tokenize", {"prompt": said}),
    ]
    answers = [send(root, path, {"model": "trapped", **body}) for path, body in good]
    assert [status for status, _ in answers] == [200] * len(good), answers
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": turns, "temperature": said}),
        ("/v1/chat/completions", {"messages": turns, said: 1}),
        ("/v1/chat/completions", {"messages": turns, "model": said}),
        ("/v1/chat/completions", {"messages": turns, "tools": [{"type": said}]}),
        ("/v1/chat/completions", {"messages": turns, "structured_outputs": {"regex": f"({said}"}}),
        ("/v1/completions", {"prompt": said * 2000, "max_tokens": 4}),
        (f"/v1/{said}", {}),
        (f"/v1/files/{said}", {}),
    ]
    for path, body in bad:
        status, _ = send(root, path, {"model": "trapped", **body}, authorization=f"Bearer {said}", cookie=said)
        assert 400 <= status < 500, (path, body, status)
    kept = {str(path): path.read_bytes() for path in everything(served) if path.is_file()}
    kept["/metrics"] = send(root, "/metrics", None)[1]
    kept["status"] = json.dumps([served.json("get"), served.json("get", "model/trapped")]).encode()
    kept["events"] = served.run("events").stdout.encode()
    assert len(kept) > 15
    assert sum(len(each) for each in kept.values()) > 10_000
    assert [name for name, each in kept.items() if CANARY.encode() in each] == []
    assert b"quire_requests" in kept["/metrics"]
