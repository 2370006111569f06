"""Backup and restore by command, and a move from a file to PostgreSQL while an engine serves."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.e2e.conftest import Platform
from tests.e2e.test_cli import ask
from tests.postgres import Postgres
from tests.waiting import eventually

from quire.client import Client


@pytest.mark.nightly
def test_what_was_applied_is_backed_up_and_restored_and_nothing_is_overwritten_without_a_word(
    platform: Platform,
) -> None:
    kept = platform.root / "kept"
    assert "there is no store" in platform.run("backup", kept, code=6).stderr
    platform.run("apply", platform.gateway)
    said = platform.run("backup", kept).stdout
    assert "1 object, 0 revisions, 0 replicas" in said
    assert "verified: restored into a fresh database, every row is the same" in said
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "is there already" in platform.run("backup", kept, code=5).stderr
    refused = platform.run("restore", kept, code=5).stderr
    assert "a control plane runs on" in refused
    platform.run("daemon", "stop")
    assert "is not empty (objects: 1, replicas: 0)" in platform.run("restore", kept, code=5).stderr
    assert "what was there is in" in platform.run("restore", kept, "--replace").stdout
    (aside,) = platform.state.root.glob("before-restore-*.backup")
    assert aside.stat().st_mode & 0o777 == 0o600
    odd = platform.write("odd", kept.read_text().replace("gateway", "gatewax"))
    assert "was changed since it was written" in platform.run("restore", odd, "--replace", code=6).stderr
    platform.state.store.unlink()
    said = platform.run("restore", kept).stdout
    assert "1 object" in said
    assert platform.json("get", "gateway/default")["intent"]["spec"] == {"port": 0}


@pytest.mark.nightly
def test_a_store_moves_to_postgres_and_back_while_its_engine_serves(
    platform: Platform, postgres: Postgres
) -> None:
    platform.run("apply", platform.gateway, platform.model("m"))
    base, before = platform.base_url("m"), platform.json("get", "model/m")["replicas"][0]["pid"]
    address = postgres.database().render_as_string(hide_password=False)

    def serves_on(store: str) -> None:
        assert ask(base, "m", "What is Quire?")["choices"]
        assert platform.json("get", "model/m")["replicas"][0]["pid"] == before
        assert Client(platform.state).get("/v1/ping")["store"].startswith(store)

    platform.run("backup", platform.root / "one")
    platform.run("daemon", "stop")
    platform.environment["QUIRE_DATABASE"] = address
    assert "has a store with 2 objects in it" in platform.run("get", code=7).stderr
    platform.run("restore", platform.root / "one")
    platform.run("daemon", "start")
    serves_on("postgresql://")
    with platform.start("daemon", "run") as waiting:
        eventually(lambda: "standing by" in platform.state.log("controlplane").read_text(), "it stands by")
        assert "one that stood by takes over" in platform.run("daemon", "stop").stdout
        eventually(lambda: f"(pid {waiting.pid}," in platform.run("daemon", "status").stdout, "it leads")
        serves_on("postgresql://")
        platform.run("backup", platform.root / "two")
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=30)
    del platform.environment["QUIRE_DATABASE"]
    assert "and QUIRE_DATABASE is not set" in platform.run("get", code=7).stderr
    platform.state.database.unlink()
    platform.run("restore", platform.root / "two", "--replace")
    platform.run("daemon", "start")
    serves_on(str(Path(platform.state.store)))
