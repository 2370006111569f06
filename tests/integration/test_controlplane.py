"""The control plane as a process, over its Unix socket, with the real router and a stand-in for the engine.

The control plane is told nothing of the stand-in: a package `quire_engine` on PYTHONPATH takes the engine's place.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.effort import times
from tests.integration.plane import GATEWAY, Plane, Stream, model
from tests.waiting import alive, eventually

from quire import builtin
from quire.client import HELD, Client, InvalidManifest, Refused, Unreachable
from quire_schemas import wire

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@contextmanager
def default_port_taken() -> Iterator[None]:
    """Port 8000 of loopback is taken by another program: by us, if by nobody yet."""
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind(("127.0.0.1", 8000))
            ours.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        yield


def test_one_control_plane_at_a_time_and_none_of_torch(plane: Plane) -> None:
    ping = plane.client.get("/v1/ping")
    assert plane.process is not None
    assert ping["pid"] == plane.process.pid
    assert ping["stateDir"] == str(plane.state.root)
    second, said = plane.spawn()
    assert second.wait(20) == HELD
    assert said == ""
    by_hand = [sys.executable, "-P", "-m", "quire.controlplane", "--state-dir", str(plane.state.root)]
    third = subprocess.run(by_hand, env=plane.env, capture_output=True, text=True, timeout=60)
    assert third.returncode == HELD
    assert f"another control plane (process {plane.process.pid}) has the state directory" in third.stderr
    assert "hint: " in third.stderr
    maps = Path(f"/proc/{plane.process.pid}/maps").read_text()
    assert "torch" not in maps
    assert plane.state.store.stat().st_mode & 0o777 == 0o600
    assert plane.state.root.stat().st_mode & 0o777 == 0o700
    assert plane.state.admin_socket.stat().st_mode & 0o777 == 0o600


def test_row_02_a_manifest_becomes_a_served_model_and_applying_it_again_writes_nothing(plane: Plane) -> None:
    text = model("alpha", "  servedModelNames: [alpha, first]\n")
    result = plane.apply(text)["model/alpha"]
    assert (result["result"], result["generation"], result["revision"]) == ("created", 1, 1)
    view = plane.wait_served("alpha")
    assert view["status"]["endpoints"] == {"openai": plane.base_url, "modelNames": ["alpha", "first"]}
    assert view["status"]["replicas"] == {"desired": 1, "live": 1, "ready": 1, "updated": 1, "draining": 0}
    assert view["status"]["resolved"]["dtype"] == "bfloat16"
    assert view["status"]["remedies"] == []
    progress = view["status"]["progress"]
    times = [progress[stage]["seconds"] for stage in ("accepted", "weights", "device", "loaded", "ready")]
    assert times == sorted(times)
    assert progress["weights"]["bytes"] > 0
    assert progress["device"]["device"] == "cpu"
    (replica,) = view["replicas"]
    assert (replica["id"], replica["state"], replica["incarnation"]) == ("alpha-r1-0", "Ready", 1)
    answer = plane.complete("first")
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3

    before = plane.state.store.with_name("state.db-wal").stat().st_mtime_ns
    again = plane.apply("# the same, written otherwise\n" + text)["model/alpha"]
    assert (again["result"], again["generation"]) == ("unchanged", 1)
    time.sleep(0.2)
    assert plane.state.store.with_name("state.db-wal").stat().st_mtime_ns == before
    assert plane.plan(text)["action"] == "unchanged"


def _asked_to_call(plane: Plane, name: str) -> httpx.Response:
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"model": name, "messages": [{"role": "user", "content": "?"}], "tools": [tool], "max_tokens": 1}
    return httpx.post(f"{plane.base_url}/chat/completions", json=body, timeout=60)


def test_hot_settings_reach_the_engine_and_restart_nothing(plane: Plane) -> None:
    plane.apply(model("hot", "  batching: {maxNumSeqs: 8}\n"))
    pid = plane.wait_served("hot")["replicas"][0]["pid"]
    changed = model(
        "hot", "  batching: {maxNumSeqs: 4}\n  servedModelNames: [hot, hotter]\n  parsers: {tools: none}\n"
    )
    assert _asked_to_call(plane, "hot").status_code == 200
    planned = plane.plan(changed)
    assert {change["update"] for change in planned["changes"]} == {"hot"}
    assert planned["revision"] == [1, 1]
    plane.apply(changed)
    view = plane.wait_served("hot")
    assert view["generation"] == 2
    assert view["replicas"][0]["pid"] == pid
    assert plane.complete("hotter").status_code == 200
    assert "spec.parsers.tools" in _asked_to_call(plane, "hotter").json()["error"]["message"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: plane.view("hot")["replicas"][0]["incarnation"] == 2, "a second incarnation")
    assert plane.wait_served("hot")["generation"] == 2
    told = json.loads((plane.state.replica_dir("hot-r1-0") / "2" / "engine.json").read_text())
    assert told["max_num_seqs"] == 4, "a new process begins with what is declared now"
    above = plane.plan(model("hot", "  batching: {maxNumSeqs: 9}\n"))
    assert above["revision"] == [1, 2], "above what the engine allocated for, it is rolling"
    assert "engine allocated for 8" in [change["note"] for change in above["changes"]]
    plane.delete("hot")


def test_the_policy_is_hot_and_the_router_takes_priorities_by_it(plane: Plane) -> None:
    def urgent() -> httpx.Response:
        body = {"model": "ranked", "prompt": [1, 2], "max_tokens": 1, "priority": -1}
        return httpx.post(f"{plane.base_url}/completions", json=body, timeout=30)

    plane.apply(model("ranked"))
    plane.wait_served("ranked")
    refused = urgent()
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    (before,) = plane.view("ranked")["replicas"]
    plane.apply(model("ranked", "  batching: {policy: priority}\n"))
    eventually(lambda: urgent().status_code == 200, "the router hears of the policy")
    (after,) = plane.wait_served("ranked")["replicas"]
    assert after == before, "no new replica"
    plane.delete("ranked")


def test_a_rolling_update_under_load_fails_no_request_and_a_revert_is_a_new_revision(plane: Plane) -> None:
    plane.apply(model("rolling", LOAD="0.2"))
    plane.wait_served("rolling")
    streams = [Stream(plane.base_url, "rolling", 60) for _ in range(3)]
    plane.apply(model("rolling", "  engine: {maxModelLen: 512}\n", LOAD="0.2"))
    while plane.condition("rolling", "RolledOut")["reason"] != "UpToDate":
        assert plane.complete("rolling").status_code == 200
        assert plane.condition("rolling", "Ready")["status"] == "True"
    view = plane.wait_served("rolling")
    assert [replica["id"] for replica in view["replicas"]] == ["rolling-r2-0"]
    for stream in streams:
        stream.finish()
    back = plane.apply(model("rolling", LOAD="0.2"))["model/rolling"]
    assert back["revision"] == 3
    view = plane.wait_served("rolling")
    revisions = {revision["revision"]: revision for revision in view["revisions"]}
    assert revisions[3]["templateHash"] == revisions[1]["templateHash"] != revisions[2]["templateHash"]
    assert revisions[3]["state"] == "Current"
    logs = plane.state.replica_log("rolling", "any").parent
    assert {path.name for path in logs.iterdir()} == {f"rolling-r{n}-0.log" for n in (1, 2, 3)}
    plane.apply(model("rolling", "  engine: {maxModelLen: 256}\n  revisionHistoryLimit: 1\n"))
    plane.wait_served("rolling")
    eventually(
        lambda: {path.name for path in logs.iterdir()} == {f"rolling-r{n}-0.log" for n in (3, 4)},
        "logs of revisions that are no longer on record are removed",
    )
    plane.delete("rolling")


def test_scaling_starts_and_drains_replicas_and_zero_stops_the_model(plane: Plane) -> None:
    plane.apply(model("scaled", "  replicas: 2\n"))
    view = plane.wait_served("scaled")
    first = {replica["id"]: replica["pid"] for replica in view["replicas"]}
    assert set(first) == {"scaled-r1-0", "scaled-r1-1"}
    plane.apply(model("scaled", "  replicas: 1\n"))
    view = plane.wait_served("scaled")
    assert {replica["id"]: replica["pid"] for replica in view["replicas"]} == {"scaled-r1-0": first["scaled-r1-0"]}
    plane.apply(model("scaled", "  replicas: 0\n"))
    eventually(lambda: plane.condition("scaled", "RolledOut")["status"] == "True", "scaled to zero")
    view = plane.view("scaled")
    assert view["replicas"] == []
    assert view["status"]["summary"] == "Stopped"
    assert not any(alive(pid) for pid in first.values())
    refused = plane.complete("scaled")  # at once: nothing to wait for
    assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "false")
    assert "no replica of it is wanted" in refused.json()["error"]["message"]
    plane.delete("scaled")


def test_r12_a_stream_that_is_longer_than_its_drain_ends_in_one_error_event(plane: Plane) -> None:
    plane.apply(model("longer", "  drainTimeout: 1s\n", STEP="0.03"))
    plane.wait_served("longer")
    stream = Stream(plane.base_url, "longer", 1900)
    stream.wait_running()
    began = time.monotonic()
    plane.apply(model("longer", "  drainTimeout: 1s\n  replicas: 0\n", STEP="0.03"))
    stream.join(30)
    assert not stream.is_alive()
    assert 0.9 < time.monotonic() - began < 10, "neither at once nor when it would have ended, which is a minute"
    told = [line for line in stream.lines if '"error"' in line]
    assert len(told) == 1
    assert told[0] == stream.lines[-1], "it is the last thing that is said"
    plane.wait_stopped("longer")
    assert plane.view("longer")["replicas"] == []
    plane.delete("longer")


def test_a_crashed_engine_comes_back_with_a_new_incarnation(plane: Plane) -> None:
    plane.apply(model("crashing", "  restartPolicy: {backoffBase: 100ms}\n"))
    pid = plane.wait_served("crashing")["replicas"][0]["pid"]
    os.kill(pid, signal.SIGKILL)
    view = eventually(
        lambda: (v := plane.view("crashing"))["replicas"][0]["incarnation"] == 2 and v, "a second incarnation"
    )
    view = plane.wait_served("crashing")
    assert view["replicas"][0]["restarts"] == 1
    reasons = {
        event["reason"]: event for event in plane.client.get("/v1/events", **{"for": "model/crashing"})["items"]
    }
    assert "killed by SIGKILL" in reasons["ProcessEnded"]["message"]
    logs = plane.client.get("/v1/logs", name="model/crashing", tail=50)["sources"]
    assert [source["name"] for source in logs] == ["crashing-r1-0"]
    with pytest.raises(Refused, match="model/crashing has no replica 'zz'") as unknown:
        plane.client.get("/v1/logs", name="model/crashing", replica="zz", tail=1)
    assert (unknown.value.exit_code, unknown.value.hint) == (8, "there are crashing-r1-0")
    assert "incarnation 1" in logs[0]["text"]
    assert "incarnation 2" in logs[0]["text"]
    more = plane.client.get("/v1/logs", name="model/crashing", offset=logs[0]["offset"])["sources"]
    assert more[0]["text"] == ""
    (before,) = plane.client.get("/v1/logs", name="model/crashing", previous="true")["sources"]
    assert "incarnation 1" in before["text"]
    assert "incarnation 2" not in before["text"]
    plane.delete("crashing")


def test_diff_tells_the_fields_that_differ_from_what_was_applied_and_asks_no_hub(plane: Plane) -> None:
    def differences(text: str) -> dict[str, Any]:
        (item,) = plane.client.post("/v1/diff", {"files": [{"name": "d.yaml", "text": text}]})["items"]
        found: dict[str, Any] = item
        return found

    new = differences(model("differs").replace("builtin://tiny", "hf://nobody/nothing"))
    assert (new["action"], new["intent"]["spec"]["source"]) == ("create", "hf://nobody/nothing")
    plane.apply(model("differs"))
    assert differences(model("differs"))["action"] == "unchanged"
    changed = differences(model("differs", "  replicas: 2\n  batching: {maxQueueWait: 3s}\n"))
    assert changed["action"] == "update"
    elsewhere = differences(model("differs").replace("builtin://tiny", "hf://nobody/nothing"))
    assert [each["path"] for each in elsewhere["changes"]] == ["spec.source"], "no hub is asked"
    same = differences(model("differs", "  replicas: 1\n"))
    assert (same["action"], same["changes"]) == ("update", []), "a default that is spelled out"
    fields = {each["path"]: (each["old"], each["new"], each["update"]) for each in changed["changes"]}
    assert fields["spec.replicas"] == (1, 2, "scale")
    assert set(fields) == {"spec.replicas", "spec.batching.maxQueueWait"}
    plane.delete("differs")


def test_logs_since_a_time_begin_there(plane: Plane) -> None:
    plane.apply(model("logged"))
    plane.wait_served("logged")
    (whole,) = plane.client.get("/v1/logs", name="model/logged")["sources"]
    path = plane.state.logs / "replicas" / "logged" / "logged-r1-0.log"
    with path.open("a") as log:
        now, later = (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + seconds)) for seconds in (0, 30)
        )
        log.write(f"{now},000 INFO before: all is well\n")
        log.write("Traceback (most recent call last):\n  what just happened\n")
        log.write(f"{later},000 INFO later: it goes on\n")
    (middle,) = plane.client.get("/v1/logs", name="model/logged", since=time.time() + 10)["sources"]
    assert middle["text"].startswith("Traceback"), (
        "what has no time of its own may be younger than what is above it"
    )
    assert middle["text"].endswith("later: it goes on\n")
    (whole,) = plane.client.get("/v1/logs", name="model/logged")["sources"]
    (nothing,) = plane.client.get("/v1/logs", name="model/logged", since=time.time() + 60)["sources"]
    (all_of_it,) = plane.client.get("/v1/logs", name="model/logged", since=time.time() - 600)["sources"]
    assert whole["text"] == all_of_it["text"] != ""
    assert nothing["text"] == ""
    assert nothing["offset"] == whole["offset"], "what is written from now on can be followed"
    plane.delete("logged")


def test_a_plan_that_was_kept_is_applied_only_while_it_holds(plane: Plane) -> None:
    files = [{"name": "planned.yaml", "text": model("planned", ROUND=1)}]
    items = plane.client.post("/v1/plan", {"files": files})["items"]
    assert items[0]["budget"]["serving"] == 1
    assert plane.client.post("/v1/apply", {"files": files, "planned": items})["results"][0]["result"] == "created"
    with pytest.raises(
        Refused, match=r"the plan no longer holds: model/planned: action was .*create.*unchanged"
    ) as no:
        plane.client.post("/v1/apply", {"files": files, "planned": items})
    assert no.value.exit_code == 5
    plane.wait_served("planned")

    changed = [{"name": "planned.yaml", "text": model("planned", ROUND=2)}]
    items = plane.client.post("/v1/plan", {"files": changed})["items"]
    assert items[0]["budget"] == {
        "strategy": "Auto", "surge": 1, "unavailable": 0, "serving": 1, "stopFirst": False,
    }  # fmt: skip
    plane.apply(model("planned", ROUND=3))
    with pytest.raises(
        Refused, match=r"the plan no longer holds: model/planned: revision was \[1, 2\] .* \[2, 3\] now"
    ):
        plane.client.post("/v1/apply", {"files": changed, "planned": items})
    with pytest.raises(Refused, match="not those that were planned"):
        plane.client.post("/v1/apply", {"files": changed, "planned": []})
    with pytest.raises(Refused, match="planned is the list"):
        plane.client.post("/v1/apply", {"files": changed, "planned": "yes"})
    assert plane.view("planned")["generation"] == 2, "a refusal changes nothing"
    plane.delete("planned")


def test_row_12_an_engine_that_refuses_stalls_at_once_and_a_new_intent_heals_it(plane: Plane) -> None:
    plane.apply(model("refusing", EXIT="78"))
    stalled = plane.wait_stalled("refusing")
    assert stalled["reason"] == "ConfigRejected"
    assert "StandinRefuses: told to" in stalled["message"]
    assert any("logs model/refusing" in line for line in plane.view("refusing")["status"]["remedies"])
    time.sleep(0.3)
    assert plane.view("refusing")["replicas"][0]["incarnation"] == 1, "it is not tried again"
    plane.apply(model("refusing"))
    plane.wait_served("refusing")
    plane.delete("refusing")


def test_an_engine_that_keeps_ending_is_a_crash_loop(plane: Plane) -> None:
    plane.apply(model("looping", "  restartPolicy: {backoffBase: 100ms, backoffMax: 200ms}\n", EXIT="3"))
    stalled = plane.wait_stalled("looping")
    assert stalled["reason"] == "CrashLoop"

    def told() -> dict[str, float]:
        page = httpx.get(f"{plane.base_url.removesuffix('/v1')}/metrics").text
        found = re.findall(r'^quire_(replica\w*)\{model="looping"\} (.*)$', page, re.MULTILINE)
        return {name: float(value) for name, value in found}

    expected = {"replicas_wanted": 1.0, "replicas_ready": 0.0}
    eventually(
        lambda: told().get("replica_restarts", 0) >= 3 and told().items() >= expected.items(), "/metrics says so"
    )
    plane.delete("looping")


def test_deleting_lets_running_streams_finish_and_refuses_new_requests(plane: Plane) -> None:
    plane.apply(model("leaving", STEP="0.02"))
    pid = plane.wait_served("leaving")["replicas"][0]["pid"]
    stream = Stream(plane.base_url, "leaving", 60)
    stream.wait_running()
    plane.client.delete("/v1/objects/model/leaving")
    eventually(lambda: plane.complete("leaving").status_code == 404, "the name is gone")
    assert plane.exists("leaving")
    stream.finish()
    eventually(lambda: not plane.exists("leaving"), "it is gone")
    assert not alive(pid)


def test_what_cannot_run_is_refused_with_its_place_and_a_hint(plane: Plane, tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest) as wrong:
        plane.apply("apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: x}\nspec: {sorce: a}\n")
    assert wrong.value.problems[0]["line"] == 4

    tmp_path.joinpath("config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    unsupported = model("mamba").replace("builtin://tiny", f"file://{tmp_path}")
    with pytest.raises(InvalidManifest) as wrong:
        plane.apply(model("good-neighbour"), unsupported)
    (problem,) = wrong.value.problems
    assert problem["file"] == "1.yaml"
    assert "MambaForCausalLM is not supported" in problem["message"]
    assert "LlamaForCausalLM" in problem["hint"]
    assert not plane.exists("good-neighbour"), "all or nothing"

    with pytest.raises(InvalidManifest) as wrong:
        plane.apply(model("absent").replace("builtin://tiny", "hf://nobody/nothing"))
    assert "not in the local cache" in wrong.value.problems[0]["message"]

    plane.apply(model("owner"))
    with pytest.raises(InvalidManifest) as wrong:
        plane.apply(model("thief", "  servedModelNames: [owner]\n"))
    assert "already served by model/owner" in wrong.value.problems[0]["message"]
    plane.delete("owner")


def test_the_router_tells_its_shim_when_it_serves(plane: Plane) -> None:
    """By that its shim knows which of its ends to wait longer after."""
    plane.apply(model("told"))
    plane.wait_served("told")
    (control,) = plane.state.gateway.rglob("shim.sock")
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(10)
        sock.connect(str(control))
        with sock.makefile("rwb") as file:
            file.write(b'{"op": "hello"}\n')
            file.flush()
            said = json.loads(file.readline())
    assert said["lines"] == ['{"event": "ready"}']
    plane.delete("told")


def test_files_that_were_damaged_after_the_apply_are_told_of_by_the_router(plane: Plane, tmp_path: Path) -> None:
    folder = shutil.copytree(builtin.path("tiny"), tmp_path / "model")
    plane.apply(model("damaged").replace("builtin://tiny", f"file://{folder}"))
    plane.wait_served("damaged")
    (folder / "tokenizer.json").write_text("{}")
    os.kill(plane.client.get("/v1/ping")["router"]["pid"], signal.SIGKILL)
    stalled = plane.wait_stalled("damaged")
    assert (stalled["reason"], stalled["message"]) == (
        "ModelUnusable", "the checkpoint's tokenizer.json cannot be read"
    )  # fmt: skip
    assert plane.condition("damaged", "Ready")["reason"] == "ModelUnusable"
    assert plane.view("damaged")["status"]["summary"] == "Stalled: ModelUnusable"
    plane.apply(
        model("damaged").replace("builtin://tiny", f"file://{folder}") + "  tokenizer: {source: builtin://tiny}\n"
    )
    plane.wait_served("damaged")
    plane.delete("damaged")


def test_plan_does_the_arithmetic_for_a_declared_machine(plane: Plane) -> None:
    text = model("llama").replace("builtin://tiny", "hf://meta-llama/Llama-3.1-8B-Instruct")
    gpu = {"devices": [{"kind": "cuda", "name": "NVIDIA H100", "memory": "80Gi", "index": 0}]}
    item = plane.plan(text, devices=gpu, configs={"llama": LLAMA_8B})
    assert item["action"] == "create"
    assert item["resolved"]["device"] == "cuda"
    assert item["fit"]["fits"]
    assert item["fit"]["maxModelLen"] == 131072
    assert "weights 15.0 GiB" in item["fit"]["lines"][0]
    small = {"devices": [{"kind": "cuda", "name": "small", "memory": "12Gi", "index": 0}]}
    refused = plane.plan(text, devices=small, configs={"llama": LLAMA_8B})
    assert refused["action"] == "refused"
    assert refused["problem"]["reason"] == "InsufficientMemory"
    assert not refused["fit"]["fits"]
    with pytest.raises(Refused) as wrong:
        plane.plan(text, devices={"devices": [{"kind": "tpu"}]}, configs={"llama": LLAMA_8B})
    assert wrong.value.exit_code == 3
    assert not plane.exists("llama"), "plan writes nothing"


def test_models_that_do_not_fit_together_wait_for_each_other(plane: Plane) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    half = f"  engine: {{maxModelLen: 256, kvCache: {{size: {total // 2 // 2**20}Mi}}}}\n"
    plane.apply(model("big", half))
    plane.wait_served("big")
    plane.apply(model("bigger", half))
    stalled = plane.wait_stalled("bigger")
    assert stalled["reason"] == "InsufficientMemory"
    assert plane.condition("bigger", "Scheduled")["status"] == "False"
    assert plane.view("bigger")["replicas"] == []
    plane.delete("big")
    plane.wait_served("bigger")
    plane.delete("bigger")


def test_api_errors_are_json_with_a_code(plane: Plane) -> None:
    for call in (
        lambda: plane.view("nobody"),
        lambda: plane.client.delete("/v1/objects/model/nobody"),
        lambda: plane.client.get("/v1/logs", name="model/nobody"),
    ):
        with pytest.raises(Refused) as wrong:
            call()
        assert (wrong.value.status, wrong.value.exit_code) == (404, 8)
    for path, body in (("/v1/apply", {"files": "x"}), ("/v1/down", {"grace": "x"}), ("/v1/plan", {})):
        with pytest.raises(Refused) as wrong:
            plane.client.post(path, body)
        assert wrong.value.status == 400
    for name in ("model/..", "model/../..", "model/../replicas/alpha", "model/"):
        with pytest.raises(Refused, match=r"name of an object|not an object") as wrong:
            plane.client.get("/v1/logs", name=name)
        assert wrong.value.status == 400
    with pytest.raises(Refused) as wrong:
        plane.client.get("/v1/logs")
    assert wrong.value.status == 400


def test_the_adoption_window_is_that_of_engines_started_after_it_was_declared(plane: Plane) -> None:
    def spec() -> wire.EngineSpec:
        (path,) = plane.state.replica_dir("leased-r1-0").glob("*/engine.json")
        return msgspec.json.decode(path.read_bytes(), type=wire.EngineSpec)

    plane.apply(model("leased"))
    plane.wait_served("leased")
    assert spec().adoption_window == wire.ADOPTION_WINDOW == 120, "the default of both"
    router = plane.client.get("/v1/ping")["router"]
    plane.apply(GATEWAY.replace("port: 0", "port: 0, adoptionWindow: 90s"))
    assert spec().adoption_window == 120, "no engine is restarted for it"
    plane.delete("leased")
    plane.apply(model("leased"))
    plane.wait_served("leased")
    assert spec().adoption_window == 90
    assert plane.client.get("/v1/ping")["router"] == router, "and no router"
    plane.delete("leased")
    plane.apply(GATEWAY)


def test_a_taken_port_is_refused_with_the_remedy_and_the_gateway_can_move(plane: Plane) -> None:
    plane.apply(model("moving"))
    plane.wait_served("moving")
    before = plane.base_url
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Refused) as wrong:
            plane.apply(GATEWAY.replace("port: 0", f"port: {port}"), model("portless"))
        assert wrong.value.code == "address_in_use"
        assert wrong.value.exit_code == 6
        assert "port 0" in (wrong.value.hint or "")
        assert not plane.exists("portless"), "all or nothing"
        assert plane.base_url == before
    plane.apply(GATEWAY.replace("port: 0", f"port: {port}"))
    router = eventually(lambda: (r := plane.client.get("/v1/ping")["router"])["ready"] and r, "it moves")
    assert router["baseUrl"] == f"http://127.0.0.1:{port}/v1"
    plane.wait_served("moving")
    assert plane.complete("moving").status_code == 200
    plane.delete("moving")


def test_deleting_the_gateway_is_refused_while_its_default_port_is_taken(plane: Plane) -> None:
    plane.apply(model("reached"))
    plane.wait_served("reached")
    before = plane.base_url
    with default_port_taken():
        with pytest.raises(Refused, match="default address") as wrong:
            plane.client.delete("/v1/objects/gateway/default")
        assert (wrong.value.code, wrong.value.exit_code) == ("address_in_use", 6)
        assert plane.base_url == before
        assert plane.complete("reached").status_code == 200
        (shown,) = plane.client.get("/v1/objects", kind="gateway")["items"]
        assert not shown["deleting"]
        planned = plane.plan(GATEWAY.replace("port: 0", "port: 8000"))
        assert (planned["action"], planned["problem"]["reason"]) == ("refused", "AddressInUse")
    plane.delete("reached")


def test_without_a_gateway_object_its_defaults_and_their_state_are_shown(tmp_path: Path) -> None:
    plane = Plane(tmp_path)
    plane.start()
    try:
        (shown,) = plane.client.get("/v1/objects", kind="gateway")["items"]
        assert (shown["name"], shown["generation"], shown["createdAt"]) == ("default", 0, None)
        assert shown["status"]["summary"] == "Not started"
        assert shown["status"]["endpoints"]["unavailable"] == "the router starts with the first model"
        assert plane.client.get("/v1/objects/gateway/default")["resolved"]["port"] == 8000
    finally:
        plane.end()


def test_row_05_killing_the_control_plane_drops_no_stream_and_the_next_one_adopts(
    plane: Plane, tmp_path: Path
) -> None:
    rush = tmp_path / "rush"
    plane.apply(model("kept", STEP="0.05", RUSH=rush), model("lost", "  restartPolicy: {backoffBase: 100ms}\n"))
    before = plane.wait_served("kept")["replicas"][0]
    lost = plane.wait_served("lost")["replicas"][0]["pid"]
    router = plane.client.get("/v1/ping")["router"]
    stream = Stream(plane.base_url, "kept", 900)
    stream.wait_running()
    for number in (signal.SIGKILL, signal.SIGTERM):
        plane.kill(number)
        assert alive(before["pid"])
        answer = httpx.post(
            f"{router['baseUrl']}/completions", json={"model": "kept", "prompt": "x", "max_tokens": 2}, timeout=30
        )
        assert answer.status_code == 200, "router and engine go on"
        if number is signal.SIGTERM:
            os.kill(lost, signal.SIGKILL)
            eventually(lambda: not alive(lost), "an engine ends while nobody looks")
        plane.start()
        view = plane.wait_served("kept")
        assert (view["replicas"][0]["pid"], view["replicas"][0]["incarnation"]) == (before["pid"], 1)
        assert plane.client.get("/v1/ping")["router"]["pid"] == router["pid"]
    assert stream.is_alive(), "it ran all the while"
    rush.touch()
    stream.finish()
    own = plane.client.get("/v1/events", **{"for": "controlplane/default"})["items"]
    lost = [event["message"] for event in own if event["reason"] == "ControlPlaneLost"]
    assert len(lost) == 1, "the one that was killed, and not the one that was told to end"
    adopted = [event["message"].rpartition(": ")[2] for event in own if event["reason"] == "Adopted"]
    assert [text.partition("running, ")[2] for text in adopted] == ["0 ended", "1 ended"]
    events = plane.client.get("/v1/events", **{"for": "model/kept"})["items"]
    assert [event["count"] for event in events if event["reason"] == "Started"] == [1]
    eventually(lambda: plane.view("lost")["replicas"][0]["incarnation"] == 2, "it is started again")
    messages = [event["message"] for event in plane.client.get("/v1/events", **{"for": "model/lost"})["items"]]
    assert any("killed by SIGKILL" in message for message in messages), "the shim kept the cause"
    plane.delete("kept")
    plane.delete("lost")


def test_processes_that_a_lost_store_knows_nothing_of_are_ended(plane: Plane) -> None:
    plane.apply(model("orphan"))
    pid = plane.wait_served("orphan")["replicas"][0]["pid"]
    plane.kill()
    with closing(sqlite3.connect(plane.state.store, isolation_level=None)) as db:
        db.execute("DELETE FROM replicas WHERE model = 'orphan'")
        db.execute("DELETE FROM objects WHERE name = 'orphan'")
    plane.start()
    eventually(lambda: not alive(pid), "the orphan is ended")


def test_down_stops_everything_and_the_next_start_brings_back_what_was_applied(plane: Plane) -> None:
    plane.apply(model("back", "  replicas: 2\n", CHILD="1"))
    plane.wait_served("back")
    stream = Stream(plane.base_url, "back", 60)
    stream.wait_running()
    assert plane.process is not None
    port = int(plane.base_url.rpartition(":")[2].removesuffix("/v1"))
    shared = set(Path("/dev/shm").iterdir())
    plane.client.post("/v1/down", {"grace": 20})
    assert plane.process.wait(40) == 0
    stream.finish()
    assert plane.ours() == []
    assert not plane.state.runtime.exists()
    assert set(Path("/dev/shm").iterdir()) <= shared
    with socket.create_server(("127.0.0.1", port)):
        pass


def stored_names(plane: Plane) -> set[str]:
    with closing(sqlite3.connect(plane.state.store)) as db:
        return {name for (name,) in db.execute("SELECT name FROM objects")}


def test_after_down_looking_starts_nothing_and_up_or_an_apply_brings_everything_back(plane: Plane) -> None:
    plane.start()
    plane.apply(model("beside"))
    plane.wait_served("beside")
    ways = (lambda: plane.apply(model("back")), lambda: plane.client.post("/v1/up", {}))
    for bring_back in ways[: times(1, 2)]:  # in CI `up` is a line of tests/e2e/transcripts.txt
        if plane.process is not None and plane.process.poll() is None:
            waits = Client(plane.state, wakes=True)  # of an apply that was heard, and looks what comes of it
            assert waits.get("/v1/ping")["down"] is False
            plane.client.post("/v1/down", {"grace": 0.2})
            assert plane.process.wait(40) == 0
            with pytest.raises(Unreachable, match="the platform is down"):
                waits.get("/v1/objects")
        plane.start()
        assert plane.client.get("/v1/ping")["down"] is True
        for path in ("/v1/objects", "/v1/objects/model/back", "/v1/events", "/v1/logs?name=router"):
            with pytest.raises(Refused, match="the platform is down") as refused:
                plane.client.get(path)
            assert (refused.value.status, refused.value.code, refused.value.exit_code) == (503, "down", 7)
            assert "platform up" in (refused.value.hint or "")
        if "beside" in stored_names(plane):
            plane.client.delete("/v1/objects/model/beside")
            assert "beside" not in stored_names(plane), "what does not run is gone at once"
            assert not plane.exists("beside")
        assert plane.plan(model("back"))["action"] in ("unchanged", "update")
        with pytest.raises(InvalidManifest):
            plane.apply("kind: Model\n")
        plane.kill()  # neither a restart nor a wrong manifest is a wish to have it back
        plane.start()
        assert plane.ours() == [plane.client.get("/v1/ping")["pid"]]
        bring_back()
        plane.wait_served("back")
        assert not plane.state.down_marker.exists()
        assert plane.client.post("/v1/up", {})["results"][0]["result"] == "unchanged"
