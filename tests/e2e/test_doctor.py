"""`platform doctor` beside real processes: with nothing there, with all well, and with some that do not answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform


def examined(platform: Platform, code: int) -> dict[str, Any]:
    done = platform.run("doctor", "-o", "json", code=code)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.nightly
def test_the_doctor_names_every_process_and_what_does_not_answer(platform: Platform) -> None:
    platform.run("apply", platform.gateway, platform.model("m"))
    sound = examined(platform, 0)
    ping_pid = int(platform.run("version").stdout.partition("(pid ")[2].partition(",")[0])
    assert sound["controlPlane"]["pid"] == ping_pid
    assert sound["controlPlane"]["answers"]
    (replica,) = platform.json("get", "model/m")["replicas"]
    (shown,) = sound["replicas"]
    assert (shown["enginePid"], shown["id"], shown["model"]) == (replica["pid"], replica["id"], "m")
    assert shown["engineAnswers"]
    assert shown["shimAnswers"]
    assert sound["router"]["answers"]
    assert sound["router"]["baseUrl"] == platform.base_url("m")
    assert sound["ports"][0]["state"] == "ours"
    pids = {each.pid for each in platform.processes()}
    assert {sound["router"]["pid"], sound["router"]["shimPid"], shown["shimPid"], shown["enginePid"]} <= pids

    for pid in (ping_pid, replica["pid"]):
        os.kill(pid, signal.SIGSTOP)
    try:
        ill = examined(platform, 7)
    finally:
        for pid in (ping_pid, replica["pid"]):
            os.kill(pid, signal.SIGCONT)
    assert ill["controlPlane"]["pid"] == ping_pid, "known by its lock, though it is silent"
    assert not ill["controlPlane"]["answers"]
    assert not ill["replicas"][0]["engineAnswers"]
    assert ill["router"]["answers"]
    assert f"(pid {ping_pid}) does not answer" in ill["findings"][0]["message"]

    os.kill(sound["router"]["shimPid"], signal.SIGSTOP)
    try:
        ill = examined(platform, 6)
    finally:
        os.kill(sound["router"]["shimPid"], signal.SIGCONT)
    assert not ill["router"]["shimAnswers"]
    assert ill["router"]["baseUrl"] == sound["router"]["baseUrl"]
    assert [each["id"] for each in ill["replicas"]] == [replica["id"]], "it is no replica"
    assert ill["ports"][0]["state"] == "ours"
    assert [each["message"] for each in ill["findings"]] == ["the shim of the router does not answer"]


def test_the_doctor_names_who_has_the_port_and_makes_nothing(platform: Platform) -> None:
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has it, which is as good
            ours.bind(("127.0.0.1", 8000))
            ours.listen()
        report = examined(platform, 6)
    (port,) = report["ports"]
    assert (port["port"], port["state"]) == (8000, "taken")
    assert port["pid"] is None or f"process {port['pid']}" in report["findings"][0]["message"]
    assert "another spec.port" in report["findings"][0]["hint"]
    assert not platform.state.root.exists()
    assert not platform.state.runtime.exists()
