"""Commands against prepared answers: what is asked, what is printed where, and the exit code.

The server here is a control plane's HTTP side on a Unix socket. It exists because some answers (a stall, a slow
drain, a broken body) are hard to bring about on demand; what a command does against the real control plane is
tested in tests/e2e.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from tests.unit.platform.api_views import condition, model

from quire.cli import codes, main, reference, session, top
from quire.cli.outcome import ExitCode, spelled
from quire.cli.program import COMMANDS
from quire.cli.session import KINDS
from quire.cli.show import LISTS
from quire.client import clean_environment
from quire.errors import TABLE
from quire.series import read
from quire_operators.paths import StateDir
from quire_schemas.manifest import load
from quire_schemas.model import Model, resolve_defaults

Answer = tuple[int, Any]
Script = dict[str, list[Answer]]


class AdminServer(socketserver.ThreadingUnixStreamServer):
    """Answers `METHOD /path` from its script: one answer after the other, the last for good.

    `asked` holds (method, path with query, body) of every request.
    """

    daemon_threads = True

    def __init__(self, path: str, script: Script) -> None:
        super().__init__(path, _Handler)
        self.script = script
        self.asked: list[tuple[str, str, Any]] = []

    def answer(self, method: str, target: str, body: Any) -> Answer:
        self.asked.append((method, target, body))
        key = f"{method} {target.partition('?')[0]}"
        answers = self.script.get(key)
        if not answers:
            return 404, {"error": {"code": "not_found", "message": f"no {key}", "hint": "platform get"}}
        return answers.pop(0) if len(answers) > 1 else answers[0]


class _Handler(BaseHTTPRequestHandler):
    server: AdminServer

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        status, body = self.server.answer(self.command, self.path, json.loads(raw) if raw else None)
        if body is None and status == 0:
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _serve


@contextmanager
def serving(state: StateDir, script: Script) -> Iterator[AdminServer]:
    """An admin server of that state directory, until the block ends."""
    state.create()
    server = AdminServer(str(state.admin_socket), script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        state.admin_socket.unlink(missing_ok=True)


MANIFEST = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {name: quickstart}
spec:
  source: builtin://tiny
"""
PING = {
    "version": "0.0.1",
    "pid": 4321,
    "startedAt": "2027-01-15T07:59:30Z",
    "stateDir": "/state",
    "router": {"baseUrl": "http://127.0.0.1:8000", "ready": True, "pid": 4322},
}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDir]:
    monkeypatch.setenv("QUIRE_STATE_DIR", str(tmp_path / "state"))
    directory = StateDir.default()
    yield directory
    shutil.rmtree(directory.runtime, ignore_errors=True)


@pytest.fixture
def server(state: StateDir) -> Iterator[AdminServer]:
    with serving(state, {}) as running:
        yield running


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "quickstart.yaml"
    path.write_text(MANIFEST)
    return path


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


# ── the command line itself ───────────────────────────────────────────────────────────────────────────────


def test_a_started_control_plane_comes_to_its_database_as_the_shell_would() -> None:
    given = {"PGHOST": "db", "PGPASSFILE": "/f", "PGSSLROOTCERT": "/c", "PGPASSWORD": "p", "GREETING": "x"}
    assert clean_environment(given) == {"PGHOST": "db", "PGPASSFILE": "/f", "PGSSLROOTCERT": "/c"}


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main([command, "--help"]) == ExitCode.OK
        out, err = said(capsys)
        assert out.startswith(f"Usage: platform {command}")
        assert not err


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["aply"], "no such command: aply", "did you mean 'apply'?"),
        (["get", "--nope"], "No such option", "platform get --help"),
        (["get", "pods"], "unknown list 'pods'", "one of models"),
        (["describe", "quickstart"], "does not name an object", "model/quickstart"),
        (["delete", "pod/x"], "unknown kind 'pod'", "gateway, gitsource, model"),
        (["apply", "--timeout", "30", "x.yaml"], "is not a duration", "'30s'"),
        (["apply"], "no manifest given", "manifests/quickstart.yaml"),
        (["events", "-w", "-o", "yaml"], "YAML has no form for", "-o json"),
        (["get", "-w", "-o", "yaml"], "YAML has no form for", "-o json"),
        (["scale", "model/x"], "give either a number of replicas or --reset", "platform scale model/x 2"),
        (["scale", "model/x", "2", "--reset"], "give either", "platform scale model/x 2"),
        (["pause", "model/x", "--for", "5"], "is not a duration", "'5s'"),
        (["logs", "controlplane", "--previous"], "is for engines and the router", "leave one of them out"),
        (["logs", "router", "--replica", "x"], "router has no replicas", "leave it out"),
        (["usage", "--since", "yesterday"], "'yesterday' is neither a day nor a time", "2027-01-31"),
        (["plan", "--save", "p", "--config", "c", "m.yaml"], "another machine cannot be applied", "leave --save"),
        (["convert", "--from", "vllm", "serve"], "names no model", "serve MODEL"),
    ],
)
def test_a_bad_command_line_is_2_and_ends_with_a_hint(
    args: list[str], message: str, hint: str, state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == ExitCode.USAGE
    out, err = said(capsys)
    assert not out
    assert message in err.splitlines()[0]
    assert err.startswith("error: ")
    assert err.splitlines()[-1].startswith("hint: ")
    assert hint in err.splitlines()[-1]
    assert not state.root.exists(), "nothing was started"


def test_get_imports_only_what_it_needs(state: StateDir, server: AdminServer) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model()]})]
    code = (
        "import sys; from quire.cli import main; code = main(['get']);"
        "print(sorted({'pydantic', 'rich', 'httpx', 'litestar', 'torch', 'yaml', 'sqlalchemy', 'asyncio'}"
        " & set(sys.modules)), len(sys.modules) < 300); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    assert done.stdout.splitlines()[-1] == "[] True"


def test_a_database_that_all_agree_on_costs_no_import(
    state: StateDir, server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model()]})]
    state.database.write_text(json.dumps({"database": "postgresql://db.example:5433/quire"}))
    monkeypatch.setenv("QUIRE_DATABASE", "postgresql://u:secret@db.example:5433/quire?sslmode=require")
    code = "import sys; from quire.cli import main; print(main(['get']), 'sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0 False", "")


def test_a_reader_that_leaves_is_no_error(state: StateDir, server: AdminServer) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model(name=f"model-{n}") for n in range(5000)]})]
    done = subprocess.run(
        f"{sys.executable} -c 'import sys; from quire.cli import main; sys.exit(main([\"get\"]))' | head -1;"
        "echo ${PIPESTATUS[0]}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0"
    assert not done.stderr


# ── get, describe, events, logs ───────────────────────────────────────────────────────────────────────────


def test_get_as_table_and_as_json(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model()]})]
    assert main(["get"]) == ExitCode.OK
    assert said(capsys)[0].splitlines()[1].startswith("quickstart  True")
    assert main(["get", "models", "-o", "json"]) == ExitCode.OK
    assert json.loads(said(capsys)[0])["items"][0]["name"] == "quickstart"
    assert server.asked[0][1] == "/v1/objects?kind=model"


def test_a_database_that_the_control_plane_does_not_go_by_is_told_of_once(
    state: StateDir, server: AdminServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model()]})]
    other = "postgresql://u:secret@db.example:5433/quire?sslmode=require"
    for given, kept, told in (
        (
            other,
            None,
            f"has its store in {state.store}, and QUIRE_DATABASE names postgresql://db.example:5433/quire.",
        ),
        ("mysql://x/y", None, f"has its store in {state.store}, and QUIRE_DATABASE names mysql: "),
        (
            other,
            "postgresql://db.example/quire",
            "has its store in postgresql://db.example/quire, and QUIRE_DATABA",
        ),
        (other, "postgresql://db.example:5433/quire", ""),
    ):
        monkeypatch.setenv("QUIRE_DATABASE", given)
        if kept is not None:
            state.database.write_text(json.dumps({"database": kept}))
        assert main(["get"]) == ExitCode.OK
        out, err = said(capsys)
        assert out.splitlines()[1].startswith("quickstart  True")
        assert err.startswith(f"control plane  {told}" if told else "")
        assert err.count("\n") == bool(told)
        assert "secret" not in err


def test_get_replicas_lists_those_of_all_models(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    replica = {
        "id": "quickstart-r1-0", "revision": 1, "state": "Ready", "incarnation": 2, "pid": 77,
        "since": "2027-01-15T07:59:30Z", "message": "", "devices": ["cpu"],
    }  # fmt: skip
    server.script["GET /v1/objects"] = [(200, {"items": [model(replicas=[replica])]})]
    assert main(["get", "replicas"]) == ExitCode.OK
    assert said(capsys)[0].splitlines()[1].split()[:7] == [
        "quickstart-r1-0",
        "quickstart",
        "1",
        "Ready",
        "77",
        "2",
        "cpu",
    ]
    assert main(["get", "replicas", "-o", "yaml"]) == ExitCode.OK
    assert "model: quickstart" in said(capsys)[0]


def test_the_unit_of_systemd_ends_no_engine(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["daemon", "unit"]) == ExitCode.OK
    lines = said(capsys)[0].splitlines()
    assert "KillMode=process" in lines
    assert f'Environment="QUIRE_STATE_DIR={state.root}"' in lines
    (start,) = [line for line in lines if line.startswith('ExecStart="/')]
    assert start.endswith('" daemon run')
    assert not state.root.exists()


def test_a_control_plane_of_systemds_is_not_stopped_by_hand(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["GET /v1/ping"] = [(200, {**PING, "supervisor": "systemd"})]
    assert main(["daemon", "stop"]) == ExitCode.CONFLICT
    assert "systemctl stop" in said(capsys)[1]


def test_get_wide_and_by_name(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model(), model(name="other")]})]
    assert main(["get", "-o", "name"]) == ExitCode.OK
    assert said(capsys)[0] == "model/quickstart\nmodel/other\n"
    assert main(["get", "-o", "wide"]) == ExitCode.OK
    head, first, _ = said(capsys)[0].splitlines()
    assert head.split()[-6:] == ["DTYPE", "MAX", "LEN", "MEMORY", "MODEL", "NAMES", "SOURCE"][-6:]
    assert "bfloat16  2048" in first


def test_get_watch_prints_what_changed_and_what_went(server: AdminServer, state: StateDir) -> None:
    served, starting = model(), model(status={"summary": "Starting 0/1"})
    script = [{"items": [starting]}, {"items": [starting]}, {"items": [served]}, {"items": []}, {"items": []}]
    server.script["GET /v1/objects"] = [(200, answer) for answer in script]
    with subprocess.Popen(
        [sys.executable, "-c", "from quire.cli import main; raise SystemExit(main())", "get", "-w"],
        env={"PATH": "/bin", "QUIRE_STATE_DIR": str(state.root)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == ExitCode.INTERRUPTED
    assert [line.split()[0] for line in lines] == ["NAME", "quickstart", "quickstart", "model/quickstart"]
    assert "Starting 0/1" in lines[1]
    assert "Serving" in lines[2]
    assert lines[3] == "model/quickstart  deleted\n"


def test_each_line_of_a_watch_for_programs_has_the_version_of_its_shape(
    server: AdminServer, state: StateDir
) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model()]}), (200, {"items": []}), (200, {"items": []})]
    with subprocess.Popen(
        [sys.executable, "-c", "from quire.cli import main; raise SystemExit(main())", "get", "-w", "-o", "json"],
        env={"PATH": "/bin", "QUIRE_STATE_DIR": str(state.root)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        there, gone = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert there["apiVersion"] == gone["apiVersion"]
    assert there["name"] == "quickstart"
    assert (gone["kind"], gone["deleted"]) == ("Deleted", "model/quickstart")


def test_explain_of_an_object_says_where_each_value_comes_from(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    view = model(
        intent={"spec": {"source": "builtin://tiny", "engine": {"dtype": "auto"}}},
        resolved={
            "source": "builtin://tiny", "replicas": 2,
            "engine": {"dtype": "auto", "maxModelLen": "auto", "seed": 0},
        },
        status={"overrides": [{"kind": "scale", "by": "ada", "replicas": 5, "reason": "", "since": "x"}]},
    )  # fmt: skip
    server.script["GET /v1/objects/model/quickstart"] = [(200, view)]
    assert main(["explain", "model/quickstart"]) == ExitCode.OK
    rows = {line.split("  ", 1)[0]: " ".join(line.split()[1:]) for line in said(capsys)[0].splitlines()[1:]}
    assert rows == {
        "source": "builtin://tiny manifest",
        "engine.dtype": "bfloat16 manifest, from the checkpoint",
        "engine.maxModelLen": "2048 default, from the checkpoint and the cache",
        "engine.seed": "0 default",
        "replicas": "5 scaled by ada; default: 2",
    }


def test_wait_for_what_does_not_exist_yet_and_for_what_stalls(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = (404, {"error": {"code": "not_found", "message": "no"}})
    server.script["GET /v1/objects/model/quickstart"] = [missing, missing, (200, model())]
    assert main(["wait", "model/quickstart", "--for", "ready"]) == ExitCode.OK
    assert said(capsys)[0] == "model/quickstart  ready\n"
    server.script["GET /v1/objects/model/quickstart"] = [(200, model()), missing]
    assert main(["wait", "model/quickstart", "--for", "deleted"]) == ExitCode.OK
    stuck = model(status={"conditions": [condition("Stalled", "True", "CrashLoop", "again")]})
    server.script["GET /v1/objects/model/quickstart"] = [(200, stuck)]
    assert main(["wait", "model/quickstart", "--for", "ready"]) == ExitCode.FAILED
    paused = {"kind": "pause", "by": "ada", "reason": "", "since": "x"}
    unready = model(status={"conditions": [], "overrides": [paused]})
    server.script["GET /v1/objects/model/quickstart"] = [(200, unready)]
    assert main(["wait", "model/quickstart", "--for", "ready"]) == ExitCode.CONFLICT
    assert "it is paused by ada" in said(capsys)[1]


def test_a_decision_names_who_made_it_and_waits_for_it(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    going = model(status={"rollout": {"settled": False}})
    there = model(status={"rollout": {"settled": True}})
    server.script["POST /v1/objects/model/quickstart/scale"] = [(200, {"message": "2 replicas"})]
    server.script["GET /v1/objects/model/quickstart"] = [(200, going), (200, there)]
    assert main(["scale", "model/quickstart", "2", "--reason", "a rush"]) == ExitCode.OK
    assert said(capsys)[0] == "model/quickstart  2 replicas\n"
    body = server.asked[0][2]
    assert (body["replicas"], body["reason"]) == (2, "a rush")
    assert body["by"]


def test_a_plan_is_kept_for_its_owner_and_applied_with_its_items(
    server: AdminServer, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "plan.json"
    server.script["POST /v1/plan"] = [(200, plan_answer())]
    assert main(["plan", str(manifest), "--save", str(kept)]) == ExitCode.OK
    assert kept.stat().st_mode & 0o777 == 0o600
    server.script["POST /v1/apply"] = [(200, {"results": []})]
    assert main(["apply", "--plan", str(kept), "--no-wait"]) == ExitCode.OK
    body = server.asked[-1][2]
    assert body == {"files": [{"name": str(manifest), "text": MANIFEST}], "planned": plan_answer()["items"]}
    assert main(["apply", "--plan", str(kept), str(manifest)]) == ExitCode.USAGE
    assert main(["apply", "--plan", str(manifest)]) == ExitCode.INVALID
    refused = tmp_path / "refused.json"
    server.script["POST /v1/plan"] = [(200, plan_answer("refused"))]
    assert main(["plan", str(manifest), "--save", str(refused)]) == ExitCode.INVALID
    assert not refused.exists()
    capsys.readouterr()


def test_what_export_prints_resolved_can_be_applied_too(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec: {source: 'builtin://tiny'}\n"
    (item,) = load([("m.yaml", text)]).resources
    resource = item.resource
    assert isinstance(resource, Model)
    view = model(intent=yaml.safe_load(text), resolved=resolve_defaults(resource))
    server.script = {"GET /v1/objects/model/m": [(200, view)]}
    assert main(["export", "model/m", "--resolved"]) == ExitCode.OK
    printed = capsys.readouterr().out
    found = load([("again.yaml", printed)])
    assert found.problems == []
    assert isinstance(found.resources[0].resource, Model)
    assert resolve_defaults(found.resources[0].resource) == resolve_defaults(resource)
    assert yaml.safe_load(printed)["spec"]["placement"]["priority"] == 0, "with every default that may be written"


def test_export_prints_what_can_be_applied_again(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = {"source": "builtin://tiny", "replicas": 1, "slo": None, "defaultsVersion": 3}
    server.script["GET /v1/objects/model/quickstart"] = [(200, model(resolved=resolved))]
    assert main(["export", "model/quickstart"]) == ExitCode.OK
    assert yaml.safe_load(said(capsys)[0]) == yaml.safe_load(MANIFEST)
    assert main(["export", "model/quickstart", "--resolved"]) == ExitCode.OK
    assert yaml.safe_load(said(capsys)[0])["spec"] == {"source": "builtin://tiny", "replicas": 1}
    server.script["GET /v1/objects/gateway/default"] = [(200, {"generation": 0})]
    assert main(["export", "gateway/default"]) == ExitCode.NOT_FOUND


def test_init_writes_a_manifest_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "chat"]) == ExitCode.OK
    assert main(["validate", "chat.yaml"]) == ExitCode.OK
    assert main(["init", "chat"]) == ExitCode.USAGE
    assert "is there already" in said(capsys)[1]
    assert main(["init", "Chat", "--file", "-"]) == ExitCode.INVALID
    assert main(["init", "chat", "--source", "hf://a/b", "--file", "-"]) == ExitCode.OK
    assert yaml.safe_load(said(capsys)[0])["spec"] == {"source": "hf://a/b"}


def test_top_takes_rates_of_two_looks_and_adds_replicas_up() -> None:
    page = (
        'quire_generation_tokens_total{{model="a"}} {out}\nquire_replica_up{{model="a",replica="r0"}} 1.0\n'
        'quire_replica_up{{model="a",replica="r1"}} 1.0\n'
        'quire_kv_cache_usage_ratio{{model="a",replica="r0"}} 0.5\n'
        'quire_kv_cache_usage_ratio{{model="a",replica="r1"}} 0.25\nquire_requests_held 3\n'
    )
    before, after = read(page.format(out=100)), read(page.format(out=350))
    (row, idle) = top.rows(before, after, 2.0, ["a", "b"])
    assert (row["outTokensPerSecond"], row["up"], row["kv"]) == (125.0, 2.0, 0.375)
    assert (idle["outTokensPerSecond"], idle["up"]) == (0.0, 0.0)
    assert top.rows(after, before, 2.0, ["a"])[0]["outTokensPerSecond"] == 0.0, "the router began anew"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_that_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == ExitCode.OK
    assert "_PLATFORM_COMPLETE" in said(capsys)[0]


def test_a_shell_completes_names_of_objects(server: AdminServer) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": [model(), model(name="other")]})]
    assert session.complete_objects(None, None, "model/o") == ["model/other"]
    server.script["GET /v1/objects"] = [(503, {"error": {"code": "down", "message": "down"}})]
    assert session.complete_objects(None, None, "") == []


def test_a_list_has_the_name_of_its_kind_too() -> None:
    assert set(KINDS.values()) <= LISTS.keys()


def test_a_file_without_a_manifest_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "# soon\n", "---\n---\n"):
        file = tmp_path / "empty.yaml"
        file.write_text(text)
        for command in ("apply", "plan", "validate"):
            assert main([command, str(file)]) == ExitCode.INVALID
            assert "empty.yaml:1:1: error: holds no manifest" in "".join(said(capsys))


def test_get_with_nothing_served_keeps_stdout_empty(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["GET /v1/objects"] = [(200, {"items": []})]
    assert main(["get"]) == ExitCode.OK
    out, err = said(capsys)
    assert not out
    assert "platform apply" in err


def test_an_unknown_object_is_8(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "model/nope"]) == ExitCode.NOT_FOUND
    assert said(capsys)[1].splitlines()[-1] == "hint: platform get"


def test_the_servers_exit_code_wins(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "conflict", "message": "owned by git", "hint": "take it", "exitCode": 5}
    server.script["GET /v1/objects/model/x"] = [(400, {"error": error})]
    assert main(["get", "model/x"]) == ExitCode.CONFLICT
    assert said(capsys)[1] == "error: owned by git\nhint: take it\n"


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"detail": "x"}'])
def test_an_answer_of_another_server_is_an_error_not_a_traceback(
    body: bytes, server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["GET /v1/objects"] = [(500, body)]
    assert main(["get"]) == ExitCode.UNEXPECTED
    assert said(capsys)[1].startswith("error: the control plane answered 500")


def test_a_broken_connection_is_asked_again_once_then_7(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["GET /v1/objects"] = [(0, None), (200, {"items": [model()]})]
    assert main(["get"]) == ExitCode.OK
    capsys.readouterr()
    server.script["GET /v1/objects"] = [(0, None)]
    assert main(["get"]) == ExitCode.UNREACHABLE
    assert "broke the connection" in said(capsys)[1]


def test_events_for_one_object(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    event = {
        "id": 1, "type": "Normal", "reason": "Created", "object": "model/x", "message": "revision 1", "count": 1,
        "firstSeen": "2027-01-15T07:59:30Z", "lastSeen": "2027-01-15T07:59:30Z",
    }  # fmt: skip
    server.script["GET /v1/events"] = [(200, {"items": [event]})]
    assert main(["events", "--for", "model/x"]) == ExitCode.OK
    assert server.asked[0][1] == "/v1/events?for=model%2Fx"
    assert main(["events", "--for", "controlplane"]) == ExitCode.OK
    assert server.asked[1][1] == "/v1/events?for=controlplane%2Fdefault"
    assert "Created" in said(capsys)[0]


def test_logs_of_several_replicas_say_whose_line_it_is(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [
        {"name": "r1-0", "path": "/a", "text": "one\ntwo\n", "offset": 8},
        {"name": "r1-1", "path": "/b", "text": "three\n", "offset": 6},
    ]
    server.script["GET /v1/logs"] = [(200, {"sources": sources}), (200, {"sources": sources[:1]})]
    assert main(["logs", "model/x", "--tail", "5"]) == ExitCode.OK
    assert said(capsys)[0] == "[r1-0] one\n[r1-0] two\n[r1-1] three\n"
    assert server.asked[0][1] == "/v1/logs?name=model%2Fx&tail=5"
    assert main(["logs", "router"]) == ExitCode.OK
    assert said(capsys)[0] == "one\ntwo\n"
    assert server.asked[1][1] == "/v1/logs?name=router&tail=200"


def test_logs_since_a_time_are_all_of_it_unless_a_number_of_lines_is_asked_for(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [{"name": "router", "path": "/a", "text": "one\n", "offset": 8}]
    server.script["GET /v1/logs"] = [(200, {"sources": sources})] * 2
    begin = time.time() - 600
    assert main(["logs", "router", "--since", "10m"]) == ExitCode.OK
    assert main(["logs", "router", "--since", "10m", "--tail", "3"]) == ExitCode.OK
    whole, few = (parse_qs(urlsplit(path).query) for _, path, _ in server.asked)
    assert (int(whole["tail"][0]) > 1_000_000, few["tail"]) == (True, ["3"])
    assert float(whole["since"][0]) == pytest.approx(begin, abs=5)
    assert main(["logs", "router", "--since", "10"]) == ExitCode.USAGE
    assert "--since" in said(capsys)[1]


def test_diff_prints_what_differs_and_exits_with_10_if_something_does(
    server: AdminServer, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same: dict[str, Any] = {"key": "model/same", "action": "unchanged", "changes": [], "intent": None}
    moved = {"path": "spec.replicas", "old": 1, "new": 2, "update": "scale", "note": ""}
    items = [
        {"key": "model/new", "action": "create", "changes": [], "intent": {"spec": {"engine": {"dtype": "auto"}}}},
        same,
        {"key": "model/old", "action": "update", "changes": [moved], "intent": None},
    ]
    server.script["POST /v1/diff"] = [(200, {"items": items}), (200, {"items": [same]})]
    assert main(["diff", str(manifest)]) == ExitCode.CHANGES
    assert said(capsys)[0].splitlines() == [
        "model/new  was not applied yet",
        "  + spec.engine.dtype  auto",
        "model/old",
        "  ~ spec.replicas  1 → 2  scale",
    ]
    assert main(["diff", str(manifest)]) == ExitCode.OK
    assert said(capsys)[0] == ""


# ── plan, apply, delete ───────────────────────────────────────────────────────────────────────────────────


def plan_answer(action: str = "create") -> dict[str, Any]:
    refusal = {"message": "does not fit", "hint": "smaller"}
    item = {
        "key": "model/quickstart", "action": action, "revision": [None, 1], "changes": [], "fit": None,
        "rollout": "", "notes": [], "problem": refusal if action == "refused" else None,
    }  # fmt: skip
    summary = {"create": int(action == "create"), "update": 0, "delete": 0}
    return {"items": [item], "room": {"devices": [], "waiting": [], "onDemand": []}, "summary": summary}


@pytest.mark.parametrize(
    ("action", "flags", "code"),
    [
        ("create", [], ExitCode.OK),
        ("create", ["--detailed-exitcode"], ExitCode.CHANGES),
        ("unchanged", ["--detailed-exitcode"], ExitCode.OK),
        ("refused", [], ExitCode.INVALID),
    ],
)
def test_exit_codes_of_plan(
    action: str,
    flags: list[str],
    code: ExitCode,
    server: AdminServer,
    manifest: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.script["POST /v1/plan"] = [(200, plan_answer(action))]
    assert main(["plan", str(manifest), *flags]) == code
    assert said(capsys)[0].splitlines()[-1].startswith("Plan: ")


def test_plan_sends_the_declared_devices_and_configs(server: AdminServer, manifest: Path, tmp_path: Path) -> None:
    server.script["POST /v1/plan"] = [(200, plan_answer())]
    devices, config = tmp_path / "devices.yaml", tmp_path / "config.json"
    devices.write_text("devices: [{kind: cuda, memory: 80Gi}]\n")
    config.write_text('{"hidden_size": 64}')
    assert main(["plan", str(manifest), "--devices", str(devices), "--config", str(config)]) == ExitCode.OK
    body = server.asked[0][2]
    assert body["files"] == [{"name": str(manifest), "text": MANIFEST}]
    assert body["devices"] == {"devices": [{"kind": "cuda", "memory": "80Gi"}]}
    assert body["configs"] == {"quickstart": {"hidden_size": 64}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("nope=config.json", "names the model 'nope'"),
        ("missing.json", "cannot read missing.json"),
    ],
)
def test_a_config_for_nothing_is_refused(
    config: str,
    message: str,
    server: AdminServer,
    manifest: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", str(manifest), "--config", config]) == ExitCode.USAGE
    assert message in said(capsys)[1]


def applied(result: str = "created", generation: int = 1) -> dict[str, Any]:
    return {"results": [{"key": "model/quickstart", "result": result, "generation": generation, "revision": 1}]}


def test_apply_shows_progress_line_by_line_without_a_terminal(
    server: AdminServer, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = applied()
    answer["results"][0]["warnings"] = ["spec.x: beware"]
    server.script["POST /v1/apply"] = [(200, answer)]
    starting = model(
        status={"summary": "Starting", "progress": {"accepted": {"ok": True, "seconds": 0.0}}, "conditions": []}
    )
    server.script["GET /v1/objects/model/quickstart"] = [(200, starting), (200, starting), (200, model())]
    assert main(["apply", str(manifest)]) == ExitCode.OK
    out, err = said(capsys)
    assert out.splitlines()[0] == "model/quickstart  created (revision 1)"
    assert out.splitlines()[1] == "Base URL http://127.0.0.1:8000/v1"
    assert err.splitlines() == [
        "warning: spec.x: beware",
        "quickstart  accepted 0.0s",
        "quickstart  Starting",
        "quickstart  weights 4.1 MiB 0.1s",
        "quickstart  device cpu 0.1s",
        "quickstart  loaded 1.2s",
        "quickstart  ready 3.4s",
        "quickstart  Serving",
    ]


def test_steps_of_an_earlier_start_are_not_shown_as_those_of_now(
    server: AdminServer, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["POST /v1/apply"] = [(200, applied("unchanged"))]
    starting = model(status={"summary": "Starting 0/1", "conditions": [condition("Ready", "False")]})
    server.script["GET /v1/objects/model/quickstart"] = [(200, starting), (200, model())]
    assert main(["apply", str(manifest)]) == ExitCode.OK
    assert said(capsys)[1].splitlines() == ["quickstart  Starting 0/1", "quickstart  Serving"]


def test_without_a_command_there_is_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == ExitCode.USAGE
    out, err = said(capsys)
    assert out == ""
    assert err.startswith("Usage: platform ")
    assert "error:" not in err


def test_what_a_command_does_is_said_in_one_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ([], ["cache"], ["secret"]):
        assert main([*group, "--help"]) == ExitCode.OK
        assert "..." not in said(capsys)[0].partition("Commands:")[2]


def test_applying_the_same_again_says_unchanged_and_nothing_else(
    server: AdminServer, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["POST /v1/apply"] = [(200, applied("unchanged"))]
    server.script["GET /v1/objects/model/quickstart"] = [(200, model())]
    assert main(["apply", "-f", str(manifest)]) == ExitCode.OK
    assert said(capsys) == ("model/quickstart  unchanged\n", "")


def test_a_stall_is_6_at_once(server: AdminServer, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.script["POST /v1/apply"] = [(200, applied())]
    stalled = model(status={"conditions": [condition("Stalled", "True", "CrashLoop", "out of memory")]})
    server.script["GET /v1/objects/model/quickstart"] = [(200, stalled)]
    before = time.monotonic()
    assert main(["apply", str(manifest)]) == ExitCode.FAILED
    assert time.monotonic() - before < 5
    err = said(capsys)[1].splitlines()
    assert err[-2:] == [
        "error: model/quickstart  Stalled: CrashLoop (out of memory)",
        "hint: platform describe model/quickstart",
    ]


def test_a_timeout_is_4_and_no_wait_asks_nothing(
    server: AdminServer, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["POST /v1/apply"] = [(200, applied())]
    starting = model(status={"summary": "Starting", "conditions": [], "progress": {}})
    server.script["GET /v1/objects/model/quickstart"] = [(200, starting)]
    assert main(["apply", str(manifest), "--timeout", "250ms"]) == ExitCode.TIMED_OUT
    assert "not ready after 0.25 s: Starting" in said(capsys)[1]
    server.asked.clear()
    assert main(["apply", str(manifest), "--no-wait"]) == ExitCode.OK
    assert [asked[0] for asked in server.asked] == ["POST"]


def test_ctrl_c_detaches(state: StateDir, server: AdminServer, manifest: Path) -> None:
    server.script["POST /v1/apply"] = [(200, applied())]
    starting = model(status={"summary": "Starting", "conditions": [], "progress": {}})
    server.script["GET /v1/objects/model/quickstart"] = [(200, starting)]
    command = "import sys; from quire.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", command, "apply", str(manifest)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "quickstart  Starting\n"
        process.send_signal(2)
        _, err = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "^C detached: the rollout continues" in err
    assert "Traceback" not in err


def test_a_bad_manifest_is_3_and_starts_nothing(
    state: StateDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(MANIFEST + "  paralelism: {tensor: 2}\n")
    for command in ("apply", "plan", "validate"):
        assert main([command, str(bad)]) == ExitCode.INVALID
        text = "".join(said(capsys))
        assert f"{bad}:6:3: error: spec.paralelism" in text
        assert "    hint: did you mean 'parallelism'?" in text
        assert "1 error" in text
    assert not state.root.exists()


def test_problems_that_only_the_control_plane_sees_are_shown_the_same_way(
    server: AdminServer, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {
        "file": "q.yaml",
        "line": 5,
        "col": 3,
        "path": "spec.source",
        "message": "not here",
        "hint": "fetch it",
    }
    server.script["POST /v1/apply"] = [(422, {"problems": [problem]})]
    assert main(["apply", str(manifest)]) == ExitCode.INVALID
    assert said(capsys)[1] == "q.yaml:5:3: error: spec.source: not here\n    hint: fetch it\n1 error\n"


def test_delete_waits_until_the_object_is_gone(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    draining = model(deleting=True, status={"summary": "Draining: 2 requests"})
    server.script["DELETE /v1/objects/model/quickstart"] = [(202, {})]
    server.script["GET /v1/objects/model/quickstart"] = [
        (200, draining),
        (200, draining),
        (404, {"error": {"code": "not_found"}}),
    ]
    assert main(["delete", "model/quickstart"]) == ExitCode.OK
    out, err = said(capsys)
    assert out == "model/quickstart  deleting\nmodel/quickstart  deleted\n"
    assert err == "model/quickstart  Draining: 2 requests\n"


def test_delete_says_what_goes_along_with_a_source_and_what_stays(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/v1/objects/gitsource/prod"
    departing = {"deleted": ["route/r", "model/m"], "stay": {"route/a": "it was changed by hand"}}
    view = model(kind="gitsource", name="prod", status={})
    server.script[f"DELETE {path}"] = [(202, {**view, "objects": departing})]
    server.script[f"GET {path}"] = [(200, view), (404, {"error": {"code": "not_found"}})]
    assert main(["delete", "gitsource/prod", "--prune", "--take-ownership"]) == ExitCode.OK
    assert ("DELETE", f"{path}?takeOwnership=true&prune=true", None) in server.asked
    assert said(capsys)[0] == (
        "gitsource/prod  deleting\n"
        "route/r  deleting, with gitsource/prod\n"
        "model/m  deleting, with gitsource/prod\n"
        "route/a  stays: it was changed by hand\ngitsource/prod  deleted\n"
    )


# ── down, version, and no control plane ───────────────────────────────────────────────────────────────────


def test_down_and_version_start_nothing(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down"]) == ExitCode.OK
    assert said(capsys)[0] == "nothing is running\n"
    assert main(["version"]) == ExitCode.OK
    assert said(capsys)[0].splitlines()[1] == "control plane  not running"
    assert not state.root.exists()


def test_down_says_what_stops_and_waits_for_the_lock(
    state: StateDir, server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["GET /v1/ping"] = [(200, PING)]
    server.script["GET /v1/objects"] = [(200, {"items": [model()]})]
    server.script["POST /v1/down"] = [(202, {})]
    with open(state.daemon_lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        release = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        release.start()
        before = time.monotonic()
        assert main(["down", "--grace", "2s"]) == ExitCode.OK
        assert time.monotonic() - before >= 0.25
        release.join()
    out = said(capsys)[0].splitlines()
    assert out[:3] == [
        "model/quickstart  1 replica stopping",
        "router  stopping (pid 4322)",
        "control plane  stopping (pid 4321)",
    ]
    assert ("POST", "/v1/down", {"grace": 2.0}) in server.asked
    assert not state.runtime.exists()


def test_down_waits_for_a_control_plane_that_is_ending_already(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not listen any more: a down before this one was interrupted."""
    state.create()
    with open(state.daemon_lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        release = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        release.start()
        before = time.monotonic()
        assert main(["down"]) == ExitCode.OK
        assert time.monotonic() - before >= 0.25
        release.join()
    assert said(capsys)[0] == "nothing is running\n"


def test_down_waits_for_none_that_stands_by_with_the_lock(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that cannot reach its database keeps it, and ends by the mark that `down` leaves."""
    state.create()
    with open(state.daemon_lock, "w") as lock, open(state.standby_lock, "w") as waiting:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(waiting, fcntl.LOCK_SH)
        assert main(["down"]) == ExitCode.OK
    assert said(capsys)[0] == "nothing is running\n"
    assert state.down_marker.exists()


def test_a_down_that_leaves_something_alive_says_what_and_fails(
    state: StateDir, server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["GET /v1/ping"] = [(200, PING), (200, {**PING, "downFailed": "still alive: m-r1-0"})]
    server.script["GET /v1/objects"] = [(200, {"items": []})]
    server.script["POST /v1/down"] = [(202, {})]
    with open(state.daemon_lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["down"]) == ExitCode.FAILED
    out, err = said(capsys)
    assert "down." not in out
    assert "still alive: m-r1-0" in err
    assert "hint: platform down tries again" in err


def test_down_removes_the_sockets_that_killed_processes_left(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    state.create()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(state.gateway / "shim.sock"))
    assert main(["down"]) == ExitCode.OK
    assert said(capsys)[0] == "nothing is running\n"
    assert not state.runtime.exists()
    for command in (["get"], ["describe", "model/m"], ["events"], ["logs", "router"]):
        assert main(command) == ExitCode.UNREACHABLE
        out, err = said(capsys)
        assert out == ""
        assert err.startswith("error: the platform is down: platform down stopped it")
        assert "hint: platform up" in err
    assert main(["version"]) == ExitCode.OK
    assert "down: platform up" in said(capsys)[0]
    assert not state.runtime.exists(), "looking made nothing"


def test_version_tells_of_another_version(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script["GET /v1/ping"] = [(200, PING)]
    assert main(["version"]) == ExitCode.OK
    out, err = said(capsys)
    assert "control plane  0.0.1 (pid 4321" in out
    assert "this command" in err


def test_a_state_directory_that_cannot_be_made_is_7(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUIRE_STATE_DIR", str(tmp_path / "file" / "state"))
    assert main(["get"]) == ExitCode.UNREACHABLE
    assert "cannot make the state directory" in said(capsys)[1]


def test_a_socket_folder_that_others_can_write_is_not_trusted(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(state, {"GET /v1/objects": [(200, {"items": []})]}):
        state.runtime.chmod(0o777)
        assert main(["get"]) == ExitCode.UNREACHABLE
        assert "is not a folder of this user with mode 0700" in said(capsys)[1]
        state.runtime.chmod(0o700)


# ── what needs no control plane ───────────────────────────────────────────────────────────────────────────


def test_validate_reports_all_files_in_one_run_in_three_forms(
    state: StateDir, tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(MANIFEST.replace("quickstart", "other") + "  replicas: many\n")
    missing = tmp_path / "gone.yaml"
    assert main(["validate", str(manifest)]) == ExitCode.OK
    assert said(capsys) == ("1 object in 1 file: valid\n", "")
    paths = [str(manifest), str(bad), str(missing)]
    assert main(["validate", *paths]) == ExitCode.INVALID
    text = said(capsys)[0].splitlines()
    assert text[-1] == "2 errors"
    assert any(line.startswith(f"{bad}:6:13: error: spec.replicas:") for line in text)
    assert any(line.startswith(f"{missing}:1:1: error: ") for line in text)
    assert main(["validate", *paths, "-o", "json"]) == ExitCode.INVALID
    document = json.loads(said(capsys)[0])
    assert not document["valid"]
    assert {problem["file"] for problem in document["problems"]} == {str(bad), str(missing)}
    assert main(["validate", *paths, "-o", "github"]) == ExitCode.INVALID
    assert f"::error file={bad},line=6,col=13::spec.replicas: " in said(capsys)[0]
    assert not state.root.exists()


def test_validate_reads_stdin_and_folders(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MANIFEST.replace("quickstart", "two").encode())))
    assert main(["validate", "-", str(tmp_path)]) == ExitCode.OK
    assert said(capsys)[0] == "2 objects in 2 files: valid\n"


def test_schema_is_json_and_explain_knows_fields_and_reasons(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema"]) == ExitCode.OK
    assert json.loads(said(capsys)[0])["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert main(["explain", "model.spec.batching.chunkedPrefill"]) == ExitCode.OK
    assert "update: hot" in said(capsys)[0]
    assert main(["explain", "reason/crashloop"]) == ExitCode.OK
    assert "platform logs model/NAME" in said(capsys)[0]
    assert main(["explain", "reason"]) == ExitCode.OK
    assert "InsufficientMemory" in said(capsys)[0]
    assert main(["explain", "queue_full"]) == ExitCode.OK
    told = said(capsys)[0]
    assert "429 (rate_limit_exceeded)" in told
    assert "spec.batching.maxQueueLength" in told
    assert {row.code for row in TABLE.values()} - {None} == codes.MEANING.keys()
    for topic, hint in (("model.spec.batchin", "batching"), ("reason/CrashLop", "reason/CrashLoop")):
        assert main(["explain", topic]) == ExitCode.NOT_FOUND
        assert hint in said(capsys)[1].splitlines()[-1]
    assert not state.root.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("router", "platform get gateway"),
        ("controlplane", "platform version"),
        ("bogus", "controlplane and router"),
    ],
)
def test_a_log_that_is_not_there_says_what_to_ask_instead(
    name: str, words: str, server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script["GET /v1/logs"] = [(200, {"sources": []})]
    assert main(["logs", name]) != ExitCode.OK
    assert words in said(capsys)[1].splitlines()[-1]


def test_hints_name_the_program_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / ".venv" / "bin" / "platform"
    installed.parent.mkdir(parents=True)
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(installed)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert spelled("platform get; platform apply x") == ".venv/bin/platform get; .venv/bin/platform apply x"
    assert spelled("written by the platform") == "written by the platform"
    monkeypatch.setenv("PATH", str(installed.parent))
    assert spelled("platform get") == "platform get"


def test_the_reference_has_each_error_once() -> None:
    rows = [line for line in reference.api_page().partition("## Errors")[2].splitlines() if line.startswith("| ")]
    assert len(rows) == len(set(rows)) > 20


def test_what_no_text_could_say_and_no_disk_can_take_ends_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "model/\udcff"]) == ExitCode.USAGE
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: 'model/\\udcff' is not UTF-8", "hint: write names and texts as UTF-8"]
    code = "import sys; from quire.cli import main; sys.exit(main(sys.argv[1:]))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "explain", "model.spec"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == ExitCode.UNEXPECTED
    assert done.stderr.splitlines() == [
        "error: cannot write the output: No space left on device",
        "hint: make room where it goes",
    ]


def test_an_empty_path_and_a_hidden_folder_are_no_manifests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec: {source: 'builtin://tiny'}\n"
    (tmp_path / "m.yaml").write_text(text)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "theirs.yaml").write_text("not: ours\n")
    assert main(["validate", "."]) == ExitCode.OK
    capsys.readouterr()
    assert main(["validate", ""]) == ExitCode.INVALID
    assert "the path is empty" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "../x", "a/b"])
def test_what_is_no_name_of_a_secret_is_refused_here(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["secret", "delete", name]) == ExitCode.USAGE
    assert "is no name of a secret" in capsys.readouterr().err
