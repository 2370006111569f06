"""Models from a hub: the real command line, control plane, download and engine against a hub of our own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests import standin_hub
from tests.e2e.conftest import Platform
from tests.standin_hub import Hub
from tests.waiting import eventually

from quire.builtin import path as builtin_path

TOKEN = "hf_kept_out_of_everything"
MANIFEST = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: {name}}}
spec:
  source: hf://acme/small
  engine: {{maxModelLen: 1024, kvCache: {{size: 16Mi}}}}
  resources: {{cpu: 1}}
"""


def small_files() -> dict[str, bytes]:
    """A model that an engine can serve, with files beside it that nobody needs."""
    files = {path.name: path.read_bytes() for path in builtin_path().iterdir() if path.is_file()}
    return files | {"README.md": b"# small", "pytorch_model.bin": b"x" * 200_000, "original/a.pth": b"y"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standin_hub.serve() as own:
        yield own


@pytest.fixture
def at_hub(platform: Platform, hub: Hub, tmp_path: Path) -> Platform:
    """A platform whose hub is ours, with a cache of its own and no login."""
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
        platform.environment.pop(name, None)
    platform.environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    return platform


def manifest(platform: Platform, name: str = "small", more: str = "") -> Path:
    return platform.write(f"{name}.yaml", MANIFEST.format(name=name) + more)


def fetchers(platform: Platform) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "quire_operators.fetch" in process.cmdline() and process.environ().get("QUIRE_STATE_DIR") == str(
                platform.state.root
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def condition(platform: Platform, model: str, kind: str) -> dict[str, Any]:
    view = platform.json("get", f"model/{model}")
    return next(c for c in view["status"]["conditions"] if c["type"] == kind)


# in CI: tests/integration/test_source_change.py, tests/unit/operators/test_fetch.py
@pytest.mark.nightly
def test_a_model_is_downloaded_survives_kill_9_and_is_served(at_hub: Platform, hub: Hub) -> None:
    """From an empty machine to a served model: planned before anything large is fetched, fetched with progress,
    gone on from after the control plane was killed, verified, pinned, listed, offline afterwards, pruned."""
    platform = at_hub
    repository = hub.repository("acme/small", token=TOKEN)
    commit = repository.commit(small_files())
    weights = len(small_files()["model.safetensors"])
    platform.environment["MY_TOKEN"] = TOKEN
    platform.run("secret", "set", "hub", "--from-env", "MY_TOKEN")
    del platform.environment["MY_TOKEN"]
    own = manifest(platform, more="  sourceAuth: {secretRef: hub}\n")

    planned = platform.run("plan", own)
    assert f"downloads 10.0 MiB (commit {commit[:12]})" in planned.stdout
    assert not [seen for seen in hub.seen if "model.safetensors" in seen.path], "a plan fetches no weights"

    hub.rate = 2_000_000
    apply = platform.start("apply", platform.gateway, own)
    eventually(lambda: sum(hub.bytes_sent.values()) > 3_500_000, "a third of the download", logs=platform.logs)
    [process] = fetchers(platform)
    inherited = process.environ()
    assert TOKEN not in " ".join(process.cmdline()) + " ".join(inherited.values())
    assert condition(platform, "small", "Fetched")["reason"] == "Downloading"
    assert not list(Path(platform.environment["HF_HOME"]).rglob("snapshots/*/model.safetensors"))
    pid = platform.json("get", "gateway/default") and eventually(
        lambda: next((p.pid for p in platform.processes() if "quire.controlplane" in p.cmdline()), None),
        "the control plane's process",
        logs=platform.logs,
    )
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not process.is_running(), "the download ends with the control plane", logs=platform.logs)
    hub.rate = None
    out, err = apply.communicate(timeout=120)
    assert apply.returncode == 0, out + err + platform.logs()
    assert "weights" in err
    assert "MiB/s" in err

    resumed = [seen.range for seen in hub.downloads() if "/cdn/" in seen.path and seen.range]
    assert resumed
    assert int(resumed[0].removeprefix("bytes=").removesuffix("-")) > 2_000_000
    path = next(path for path in hub.bytes_sent if path.startswith("/cdn/") and hub.bytes_sent[path] >= weights)
    assert hub.bytes_sent[path] < 1.5 * weights, "what had arrived was not fetched again"
    assert not [seen for seen in hub.seen if ".bin" in seen.path or ".pth" in seen.path]
    assert all(TOKEN not in (seen.authorization or "") for seen in hub.seen if "/cdn/" in seen.path)

    view = platform.json("get", "model/small")
    assert view["resolved"]["revision"] == view["status"]["resolved"]["commit"] == commit
    assert condition(platform, "small", "Fetched")["reason"] == "Verified"
    for file in platform.state.root.rglob("*"):
        if file.is_file() and file.parent.name != "secrets":
            assert TOKEN.encode() not in file.read_bytes(), file
    for path_ in platform.state.runtime.rglob("*.json"):
        assert TOKEN not in path_.read_text()

    # The branch moves: nothing that runs changes, and a plan says so.
    moved = repository.commit(small_files() | {"config.json": small_files()["config.json"] + b"\n"})
    edited = manifest(platform, more="  sourceAuth: {secretRef: hub}\n  batching: {maxQueueLength: 7}\n")
    assert f"main of hf://acme/small is at {moved} on the hub by now" in platform.run("plan", edited).stdout
    before = {replica["pid"] for replica in view["replicas"]}
    platform.run("apply", edited)
    view = platform.json("get", "model/small")
    assert {replica["pid"] for replica in view["replicas"]} == before
    assert view["resolved"]["revision"] == commit

    # All is local now: with no hub, a second model of the same source needs none.
    requests = len(hub.seen)
    platform.run("down", "--grace", "1s")
    platform.environment["HF_HUB_OFFLINE"] = "1"
    platform.run("apply", manifest(platform, "other", "  replicas: 0\n"), "--no-wait")
    eventually(
        lambda: platform.json("get", "model/small")["status"]["replicas"]["ready"] == 1,
        "serving",
        logs=platform.logs,
    )
    assert len(hub.seen) == requests

    listed = platform.json("cache", "list")
    [item] = listed["items"]
    assert item["usedBy"] == ["model/other", "model/small"]
    assert item["bytes"] > weights
    assert item["prunableBytes"] == 0
    assert item["lastUsed"]
    assert "hf://acme/small" in platform.run("cache", "list").stdout
    assert platform.run("cache", "prune").stdout == "0 B freed\n"
    platform.run("delete", "model/small", "model/other")
    assert "would be freed" in platform.run("cache", "prune", "--dry-run").stdout
    assert len(platform.json("cache", "list")["items"]) == 1
    assert "10.1 MiB freed" in platform.run("cache", "prune").stdout
    assert platform.json("cache", "list")["items"] == []


def test_llama_of_the_examples_is_planned_for_a_gpu_from_the_hub(at_hub: Platform, hub: Hub) -> None:
    """All of `platform apply manifests/llama.yaml` that comes before the device, with HF_TOKEN of the shell."""
    platform = at_hub
    examples = platform.manifests.parent / "docs" / "examples"
    names = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
    hub.repository("meta-llama/Llama-3.1-8B-Instruct", token=TOKEN, gated=True).commit(
        dict.fromkeys(names, b"w" * 300_000)
        | {
            "config.json": (examples / "llama-3.1-8b.config.json").read_bytes(),
            "tokenizer.json": small_files()["tokenizer.json"],
            "model.safetensors.index.json": json.dumps(
                {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
            ).encode(),
            "original/consolidated.00.pth": b"pickle",
        }
    )
    platform.environment["HF_TOKEN"] = TOKEN
    report = platform.json("plan", platform.manifests / "llama.yaml", "--devices", examples / "one-l4.yaml")
    [item] = report["items"]
    assert item["action"] == "create"
    assert item["fit"]["fits"]
    assert (item["resolved"]["device"], item["resolved"]["maxModelLen"]) == ("cuda", 8192)
    assert any(note.startswith("downloads 1.1 MiB") for note in item["notes"])
    assert not hub.bytes_sent.keys() & {path for path in hub.bytes_sent if "model-0000" in path}


def test_what_the_hub_refuses_is_said_at_apply(at_hub: Platform, hub: Hub) -> None:
    """Each with its place and a remedy, and nothing is stored."""
    platform = at_hub
    hub.repository("acme/gated", token=TOKEN, gated=True).commit(small_files())
    hub.repository("acme/small").commit(small_files())

    def refused(source: str, more: str = "") -> str:
        text = MANIFEST.format(name="small").replace("hf://acme/small", source) + more
        return platform.run("apply", platform.gateway, platform.write("small.yaml", text), code=3).stderr

    said = refused("hf://acme/gated")
    assert "small.yaml:" in said
    assert "spec.source: hf://acme/gated is gated; no token was sent" in said
    assert f"hint: accept its terms at {hub.url}/acme/gated" in said
    said = refused("hf://acme/gated", "  sourceAuth: {file: /nowhere/token}\n")
    assert "spec.sourceAuth: /nowhere/token cannot be read" in said
    hub.rules.append(standin_hub.fail(503, "/api/models/"))
    said = refused("hf://acme/small")
    assert "answers 503" in said
    assert "hint: apply it again" in said
    assert platform.json("get", "models")["items"] == []

    # What is refused later, in the middle, is a condition; the model can be deleted, and what came can be pruned.
    hub.rules[:] = [standin_hub.fail(403, "model.safetensors")]
    own = manifest(platform)
    said = platform.run("apply", own, code=6).stderr
    assert "model/small  Stalled: Unauthorized (hf://acme/small is not given out" in said or (
        "Stalled: Unauthorized (hf://acme/small does not exist, or is private" in said
    )
    view = platform.json("describe", "model/small")
    assert view["status"]["summary"] == "Stalled: Unauthorized"
    assert any("hf auth login" in remedy for remedy in view["status"]["remedies"])
    assert "Unauthorized" in {event["reason"] for event in view["events"]}
    platform.run("delete", "model/small")
    assert "freed" in platform.run("cache", "prune").stdout
