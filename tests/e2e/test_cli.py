"""The command line against real processes: what a user types, what is seen, and the exit code."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.e2e.conftest import GATEWAY
from tests.effort import examples
from tests.waiting import eventually

from quire.client import Client

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"


def ask(base: str, model: str, content: str) -> dict[str, Any]:
    """One chat completion, as curl would send it."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24}
    request = urllib.request.Request(
        f"{base}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_the_life_of_a_model(platform: Platform) -> None:
    trace = platform.root / "schedule.jsonl"
    variables = f"  env: [{{name: QUIRE_SCHEDULE_TRACE, value: {trace}}}]\n"
    text = (platform.manifests / "quickstart.yaml").read_text()
    quickstart = platform.write("quickstart.yaml", text + variables)

    done = platform.run("apply", platform.gateway, quickstart)
    assert re.search(
        r"control plane  not running: started quire \S+ \(pid \d+, log .*controlplane.log\)", done.stderr
    )
    assert "model/quickstart  created (revision 1)" in done.stdout
    steps = [
        line.split()[1]
        for line in done.stderr.splitlines()
        if line.startswith("quickstart  ") and line.endswith("s")
    ]
    assert [step for step in steps if step in ("accepted", "weights", "device", "loaded", "ready")] == [
        "accepted", "weights", "device", "loaded", "ready",
    ]  # fmt: skip
    base = re.search(r"^Base URL (http://127\.0\.0\.1:\d+/v1)$", done.stdout, re.M)
    assert base is not None
    assert ask(base[1], "quickstart", "What is PagedAttention?")["choices"][0]["message"]["content"]

    row = platform.run("get").stdout.splitlines()[1].split()
    assert row[:5] == ["quickstart", "True", "True", "1/1", "1"]
    view = platform.json("get", "model/quickstart")
    assert view["status"]["endpoints"]["openai"] == base[1]
    described = platform.run("describe", "model/quickstart").stdout
    for word in (
        "Conditions",
        "RolledOut",
        "Replicas",
        "Resolved",
        "maxModelLen",
        "source  builtin://tiny",
        "Events",
    ):
        assert word in described
    assert "quickstart" in platform.run("get", "replicas").stdout
    assert base[1] in platform.run("get", "gateway").stdout

    # The same again changes nothing: no event, no process, no revision.
    pid = view["replicas"][0]["pid"]
    events = platform.json("events")
    assert platform.run("plan", quickstart, "--detailed-exitcode").stdout.splitlines()[-1] == (
        "Plan: 0 to create, 0 to update, 0 to delete."
    )
    assert platform.run("apply", quickstart).stdout == "model/quickstart  unchanged\n"
    again = platform.json("get", "model/quickstart")
    assert (again["generation"], again["replicas"][0]["pid"]) == (view["generation"], pid)
    assert platform.json("events") == events

    assert platform.run("logs", "model/quickstart", "--tail", "5").stdout
    assert platform.run("logs", "router").stdout
    assert platform.run("logs", "controlplane").stdout is not None
    assert "model/quickstart" in platform.run("events", "--for", "model/quickstart").stdout

    answered = platform.run("quickstart", quickstart).stdout
    assert re.search(r"^model/quickstart  unchanged\n\n> What is .*\n.*\w", answered)
    assert "platform describe model/quickstart" in answered.partition("Try next")[2]

    watching = platform.start("events", "--watch", "-o", "json")
    following = platform.start("logs", "controlplane", "--follow", "--tail", "0")
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["reason"] == "Created"
    assert "model/quickstart  deleted" in platform.run("delete", "model/quickstart").stdout
    time.sleep(1)
    for command, word, goes_on in (
        (watching, '"reason": "Deleting"', "no longer watching; the control plane goes on"),
        (following, "quickstart-r1-0", "no longer following; what writes the log goes on"),
    ):
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=20)
        assert (command.returncode, err) == (130, f"\n^C {goes_on}\n")
        assert word in out
    assert not platform.run("get").stdout
    platform.run("get", "model/quickstart", code=8)
    down = platform.run("down")
    assert "control plane  stopping" in down.stdout
    assert platform.run("down").stdout == "nothing is running\n"
    replay = [sys.executable, "-m", "quire_engine.trace", str(trace)]
    replayed = subprocess.run(replay, capture_output=True, text=True, check=False)
    assert re.fullmatch(r"[1-9]\d* plans, each as recorded\n", replayed.stdout), replayed


# in CI: test_transcripts.py has the words, tests/integration/test_controlplane.py what is restarted and what not
@pytest.mark.nightly
def test_a_change_is_planned_as_it_is_done(platform: Platform) -> None:
    platform.run("apply", platform.gateway, platform.model("m"))
    before = platform.json("get", "model/m")

    hot = platform.model("m", "  batching: {maxQueueLength: 7}\n")
    planned = platform.run("plan", hot, "--detailed-exitcode", code=10).stdout
    assert re.search(r"~ spec\.batching\.maxQueueLength +512 → 7 +hot", planned)
    assert "Plan: 0 to create, 1 to update, 0 to delete." in planned
    assert platform.json("get", "model/m")["generation"] == before["generation"], "a plan changes nothing"
    assert platform.run("apply", hot).stdout.startswith("model/m  updated")
    after = platform.json("get", "model/m")
    assert after["generation"] == before["generation"] + 1
    assert after["status"]["servedRevision"] == 1
    assert after["replicas"][0]["pid"] == before["replicas"][0]["pid"], "a hot change restarts nothing"

    rolling = platform.model("m", "  batching: {maxQueueLength: 7}\n  env: [{name: APP_MODE, value: a}]\n")
    planned = platform.run("plan", rolling).stdout
    assert "model/m  revision 1 → 2" in planned
    assert re.search(r"spec\.env.* rolling", planned)
    assert re.search(r"^  Rollout  ", planned, re.M)
    platform.run("apply", rolling)
    final = platform.json("get", "model/m")
    assert final["status"]["servedRevision"] == 2
    assert final["replicas"][0]["pid"] != before["replicas"][0]["pid"]


def test_a_plan_of_something_new_shows_the_arithmetic(shared_platform: Platform) -> None:
    platform = shared_platform
    planned = platform.run("plan", platform.manifests / "quickstart.yaml").stdout
    assert planned.startswith("model/quickstart  create")
    assert re.search(r"^  Memory   .*weights .* KV ", planned, re.M)
    int8 = platform.model("m", "  quantization: {method: int8}\n")
    planned = platform.run("plan", int8).stdout
    assert re.search(r"^  Memory   weights 5\.1 MiB \(int8, int8 activations\)", planned, re.M)
    machine = "devices: [{kind: cuda, name: NVIDIA L4, memory: 24Gi, index: 0}]\ncpu: {memory: 64Gi}\n"
    gpu = platform.write("machine.yaml", machine)
    planned = platform.run("plan", int8, "--devices", gpu).stdout
    assert re.search(r"weights 5\.1 MiB \(int8, int8 activations\) .* NVIDIA L4", planned)
    invariant = platform.model("m", "  determinism: batchInvariant\n")
    refused = platform.run("plan", invariant, "--devices", gpu, code=3)
    assert "spec.determinism" in refused.stdout
    assert not platform.json("get")["items"], "a plan creates nothing"


def test_a_large_model_is_planned_for_a_declared_machine(shared_platform: Platform) -> None:
    platform = shared_platform
    config = EXAMPLES / "llama-3.1-8b.config.json"
    devices = EXAMPLES / "one-l4.yaml"
    llama = platform.manifests / "llama.yaml"
    planned = platform.json("plan", llama, "--devices", devices, "--config", config)
    fit = planned["items"][0]["fit"]
    assert fit["fits"]
    assert 14.9 * 2**30 < fit["weights"] < 15.1 * 2**30

    small = platform.write(
        "small.yaml",
        "cpu: {memory: 64Gi, cores: 16}\ndevices: [{kind: cuda, name: NVIDIA T4, memory: 16Gi, index: 0}]\n",
    )
    refused = platform.run("plan", llama, "--devices", small, "--config", config, code=3)
    assert "Refused" in refused.stdout
    assert refused.stderr.startswith("error: 1 object cannot be applied: model/llama-3.1-8b")


WRONG = {
    "unknown-field": ("  sorce: builtin://tiny\n", ":5:3: error: spec.sorce: ", "did you mean 'source'?"),
    "wrong-type": ("  source: builtin://tiny\n  replicas: many\n", ":6:13: error: spec.replicas: ", "hint: "),
    "twice": (
        "  source: builtin://tiny\n  source: builtin://tiny\n",
        ":6:3: error: spec.source: ",
        "duplicate key",
    ),
    "tab": ("\tsource: builtin://tiny\n", ":5:1: error: ", "tab"),
    "later": (
        "  source: builtin://tiny\n  parallelism: {tensor: 2}\n",
        "spec.parallelism.tensor: ",
        "not honoured by",
    ),
}


def test_wrong_manifests_are_3_without_a_control_plane(platform: Platform) -> None:
    for name, (spec, _, _) in WRONG.items():
        head = f"apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\nspec:\n"
        platform.write(f"wrong/{name}.yaml", head + spec)
    gone = platform.root / "gone.yaml"
    validated = platform.run("validate", platform.root / "wrong", gone, code=3).stdout
    applied = platform.run("apply", platform.root / "wrong", gone, code=3).stderr
    assert validated == applied
    for name, (_, place, message) in WRONG.items():
        start = validated.index(f"{name}.yaml:")
        assert place in validated[start : start + 400]
        assert message in validated[start : start + 400]
    assert f"{gone}:1:1: error: " in validated
    assert not platform.state.root.exists()


def test_what_only_the_machine_can_refuse(shared_platform: Platform) -> None:
    platform = shared_platform
    text = platform.model("x").read_text()
    checkpoint = platform.root / "mamba"
    platform.write("mamba/config.json", '{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    wrong = {
        "unknown": (text.replace("builtin://tiny", f"file://{checkpoint}"), "5:11", "MambaForCausalLM"),
        "missing": (text.replace("builtin://tiny", f"file://{checkpoint}-not"), "5:11", "mamba-not"),
        "huge": (text.replace("16Mi", "900Ti"), "6:47", "900.0 TiB"),
        "many": (text + "  replicas: 999\n", "8:13", "999 replicas"),
    }
    for name, (manifest, _, _) in wrong.items():
        platform.write(f"wrong/{name}.yaml", manifest.replace("name: x", f"name: {name}"))
    planned = platform.run("plan", platform.root / "wrong", code=3).stdout
    applied = platform.run("apply", platform.gateway, platform.root / "wrong", code=3).stderr
    for name, (_, place, word) in wrong.items():
        assert re.search(
            rf"^model/{name}  refused\n(?:  (?!Refused).*\n)*  Refused  \S+:{place}: .*{word}.*\n    hint: ",
            planned,
            re.M,
        ), planned
        assert re.search(rf"^\S+/{name}\.yaml:{place}: error: spec.*{word}.*\n    hint: ", applied, re.M), applied
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = platform.write("taken.yaml", GATEWAY.replace("port: 0", f"port: {port}"))
        said = platform.run("apply", gateway, code=6).stderr
    assert f"error: {gateway}:4:14: spec.port: the router cannot listen: 127.0.0.1:{port} is in use" in said
    assert not platform.json("get")["items"], "nothing was created"


# in CI: tests/unit/schemas/test_manifest.py, tests/integration/test_controlplane.py
@pytest.mark.nightly
def test_two_manifests_that_claim_one_name(platform: Platform) -> None:
    text = platform.model("m").read_text()
    thief = text.replace("name: m", "name: thief") + "  servedModelNames: [other, m]\n"
    one_file = platform.write("one.yaml", f"{text}---\n{thief}")
    folder = platform.write("two/b.yaml", thief).parent
    platform.write("two/a.yaml", text)
    for given, place in ((one_file, f"{one_file}:16:29"), (folder, f"{folder}/b.yaml:8:29")):
        said = platform.run("apply", given, code=3).stderr
        assert f"{place}: error: spec.servedModelNames[1]: served model name 'm' is declared twice" in said
        assert "hint: rename or remove one" in said
    assert not platform.state.root.exists(), "nothing was started for it"
    platform.run("apply", platform.gateway, platform.model("m"), "--no-wait")
    said = platform.run("apply", folder / "b.yaml", code=3).stderr
    assert f"{folder}/b.yaml:8:29: error: spec.servedModelNames[1]: " in said
    assert "already served by model/m" in said
    assert "hint: choose another name, or delete model/m first" in said
    assert [item["name"] for item in platform.json("get")["items"]] == ["m"]


def test_many_at_once_start_one_control_plane(platform: Platform) -> None:
    commands = [platform.start("get") for _ in range(4)]
    notices = ""
    for command in commands:
        _, err = command.communicate(timeout=60)
        assert command.returncode == 0, err
        notices += err
    assert notices.count("control plane  not running: started") == 1
    planes = [p for p in platform.processes() if "quire.controlplane" in p.cmdline()]
    assert len(planes) == 1


def kill_control_plane(platform: Platform) -> None:
    (plane,) = [p for p in platform.processes() if "quire.controlplane" in p.cmdline()]
    plane.send_signal(signal.SIGKILL)
    plane.wait(10)


@pytest.mark.nightly
def test_row_19_a_killed_control_plane_takes_nothing_with_it_and_the_next_command_starts_one(
    platform: Platform,
) -> None:
    platform.run("apply", platform.gateway, platform.model("m"))
    base, replica = platform.base_url("m"), platform.json("get", "model/m")["replicas"][0]
    kill_control_plane(platform)
    assert ask(base, "m", "What is Quire?")["choices"], "requests are served without a control plane"
    returned = platform.run("get", "model/m")
    assert "control plane  not running: started" in returned.stderr
    deadline = time.monotonic() + 20
    while (view := platform.json("get", "model/m"))["status"]["replicas"]["ready"] != 1:
        assert time.monotonic() < deadline, view
        time.sleep(0.1)
    assert view["replicas"][0]["pid"] == replica["pid"], "the engine was found again, not started again"

    kill_control_plane(platform)
    done = platform.run("down", "--grace", "1s")
    assert "its processes are not" in done.stderr
    assert not platform.processes(), "down finds what a dead control plane left"

    for looking in (("get",), ("describe", "model/m"), ("events",), ("logs", "model/m")):
        told = platform.run(*looking, code=7)
        assert "the platform is down" in told.stderr
        assert "hint: " in told.stderr
        assert "platform up" in told.stderr
    assert "down" in platform.run("version").stdout
    assert not platform.processes(), "looking starts nothing"
    up = platform.run("up")
    assert "model/m  starting" in up.stdout
    assert platform.base_url("m") == base, "a port that was once found is kept while it is free"
    assert ask(base, "m", "What is Quire?")["choices"]
    assert platform.run("up").stdout.count("unchanged") == 2


# in CI: test_transcripts.py has the commands; that what is served goes on, tests/integration/test_controlplane.py
@pytest.mark.nightly
def test_the_control_plane_alone_is_stopped_restarted_and_run_in_the_foreground(platform: Platform) -> None:
    platform.run("apply", platform.gateway, platform.model("m"))
    base, replica = platform.base_url("m"), platform.json("get", "model/m")["replicas"][0]
    before = platform.run("daemon", "status").stdout
    assert platform.run("daemon", "restart").stdout != before
    stopped = platform.run("daemon", "stop").stdout
    assert "what is served goes on: m." in stopped
    assert "the control plane does not run" in platform.run("daemon", "status", code=7).stderr
    assert ask(base, "m", "What is Quire?")["choices"]
    with platform.start("daemon", "run") as foreground:
        client = Client(platform.state, start=False)
        eventually(client.is_running, "it runs in the foreground")
        assert f"(pid {foreground.pid}," in platform.run("daemon", "start").stdout
        assert platform.json("get", "model/m")["replicas"][0]["pid"] == replica["pid"]
        foreground.send_signal(signal.SIGTERM)
        foreground.communicate(timeout=30)
    assert foreground.returncode == 0
    assert ask(base, "m", "What is Quire?")["choices"]


def test_ctrl_c_detaches_and_the_rollout_goes_on(platform: Platform) -> None:
    platform.run("apply", platform.gateway)
    command = platform.start("apply", platform.model("m"))
    assert command.stdout is not None
    assert command.stdout.readline().startswith("model/m  created")
    time.sleep(0.2)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=30)
    assert command.returncode == 130
    assert "^C detached: the rollout continues" in err
    assert platform.run("apply", platform.model("m")).stdout == "model/m  unchanged\n"
    assert platform.json("get", "model/m")["status"]["replicas"]["ready"] == 1


IGNORED = re.compile(r"Exception ignored in: <function _get_module_lock.*?KeyboardInterrupt: *\n", re.DOTALL)
"""Of Python's import locks, whose callbacks raise into nowhere."""


def test_ctrl_c_while_a_command_is_loaded_ends_it_without_a_word(platform: Platform) -> None:
    """At moments spread over its imports; one that is heard before Python itself is up has Python's own words."""
    began = time.monotonic()
    platform.run("version")
    life = time.monotonic() - began
    ends = []
    for tenth in range(3, 10, 2):
        command = platform.start("version")
        time.sleep(life * tenth / 10)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=60)
        if command.returncode != -signal.SIGINT:
            assert err == "" or err.startswith("\n^C interrupted: nothing was changed"), err
            assert command.returncode in (0, 130)
        ends.append(command.returncode)
    assert 130 in ends


def test_ctrl_c_at_any_moment_ends_quietly_and_loses_nothing(platform: Platform) -> None:
    """Of commands that start the control plane, submit, watch and stop; at moments spread over their life."""
    platform.run("apply", platform.gateway, platform.model("m"))
    moments = random.Random(3)  # the same moments in every run, of a life as long as it is on this machine now
    began = time.monotonic()
    platform.run("get")
    life = time.monotonic() - began
    commands: list[tuple[str | Path, ...]] = [
        ("get",),
        ("apply", platform.model("n")),
        ("quickstart", platform.model("m")),
        ("delete", "model/n"),
        ("validate", platform.manifests),
    ]
    codes = set()
    for number in range(examples(5)):
        args = commands[number % len(commands)]
        if number == 3:
            kill_control_plane(platform)
        command = platform.start(*args)
        time.sleep(0.1 + moments.random() * 1.3 * life)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=60)
        codes.add(command.returncode)
        if "quire/cli" in err or command.returncode != -signal.SIGINT:  # not Python's own start
            # what a command loads late may be interrupted where Python prints it and goes on
            assert "Traceback" not in IGNORED.sub("", err), err
            assert command.returncode in (0, 3, 5, 6, 8, 130), (args, command.returncode, err)
        if command.returncode == 130 and err:
            assert "^C " in err, (args, err)
    assert 130 in codes
    assert ask(platform.base_url("m"), "m", "What is Quire?")["choices"], "what was served still is"
    answering = platform.start("quickstart", platform.model("m"))
    assert answering.stdout is not None
    while not answering.stdout.readline().startswith("> "):
        pass
    answering.send_signal(signal.SIGINT)
    _, err = answering.communicate(timeout=60)
    assert answering.returncode == 130
    assert re.search(r"^\^C the answer was cut; model/m stays served\. To stop it: \S+ down$", err, re.M), err
    stopping = platform.start("down")
    assert stopping.stdout is not None
    while not stopping.stdout.readline().startswith("control plane  stopping"):
        pass
    stopping.send_signal(signal.SIGINT)
    stopping.communicate(timeout=60)
    assert stopping.returncode in (0, 130)
    platform.run("down")
    assert not platform.processes()


def test_a_control_plane_that_cannot_start_says_why(platform: Platform) -> None:
    platform.state.create()
    platform.state.store.mkdir()
    try:
        done = platform.run("get", code=7)
        assert "the control plane failed to start: " in done.stderr
        assert "hint: " in done.stderr.splitlines()[-1] or "hint: " in done.stderr
    finally:
        os.rmdir(platform.state.store)
