"""`platform doctor`: look at the machine and the installation, say what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from quire.cli import render
from quire.cli.outcome import ExitCode, spelled
from quire.cli.session import notice
from quire_operators.paths import StateDir


@click.command(short_help="Say what is wrong with this machine or installation.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def doctor(output: str) -> int:
    """Look at the machine, the state folder, the port, the versions and the processes, and say what is wrong.

    Works when nothing else does: the control plane is asked if it runs, and never started. Exit code 0 when
    nothing keeps Quire from working, 7 when the control plane runs and does not answer, else 6.
    """
    from quire.doctor import examine

    notice("looking; torch is loaded in a process of its own, which takes some seconds")
    report = examine(StateDir.default())
    if output == "json":
        render.dump(report, output, "Doctor")
    else:
        for line in lines(report):
            print(line)
    return exit_code(report)


def exit_code(report: dict[str, Any]) -> ExitCode:
    """What a script learns without reading the report."""
    if report["healthy"]:
        return ExitCode.OK
    plane = report["controlPlane"]
    silent = plane["pid"] is not None and not plane["answers"]
    return ExitCode.UNREACHABLE if silent else ExitCode.FAILED


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people: one line a subject, then what is wrong."""
    rows = [[name, text] for name, text in _rows(report)]
    width = max(len(name) for name, _ in rows)
    shown = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    for finding in report["findings"]:
        shown += ["", f"{finding['severity']}: {finding['message']}", f"hint: {spelled(finding['hint'])}"]
    return [*shown, "", _conclusion(report)]


def _conclusion(report: dict[str, Any]) -> str:
    errors = sum(finding["severity"] == "error" for finding in report["findings"])
    warnings = len(report["findings"]) - errors
    if not report["findings"]:
        return "nothing is wrong"
    return f"{render.count(errors, 'error')}, {render.count(warnings, 'warning')}"


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _hardware(report)
    for disk in report["disk"]:
        room = disk["problem"] or f"{render.size(disk['free'])} free of {render.size(disk['total'])}"
        absent = "" if disk["exists"] else ", not made yet"
        yield f"disk {disk['what']}", f"{disk['path']}: {room} ({disk['fileSystem'] or 'unknown'}{absent})"
    yield "store", _store(report["stateDir"]["store"])
    for port in report["ports"]:
        who = f" by process {port['pid']}, {port['process']}" if port["state"] == "taken" and port["pid"] else ""
        yield "port", f"{port['host']}:{port['port']} {port['state']}{who}"
    plane, router = report["controlPlane"], report["router"]
    yield "control plane", _process(plane["pid"], plane["answers"])
    where = f", {router['baseUrl']}" if router["baseUrl"] else ""
    asked = f"pid {router['pid']}, not asked" if router["problem"] else _process(router["pid"], router["answers"])
    yield "router", asked + where
    for replica in report["replicas"]:
        engine = _process(replica["enginePid"], replica["engineAnswers"])
        yield "replica", f"{replica['id'] or replica['model']}: engine {engine}, shim {replica['shimPid']}"
    yield from _software(report)


def _hardware(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    machine, memory, devices = report["machine"], report["memory"], report["devices"]
    yield "machine", f"{machine['system']}, {machine['architecture']}, {machine['cpu'] or 'unknown processor'}"
    yield "features", " ".join(machine["features"]) or "none that kernels ask for"
    cores = machine["cores"]
    bound = f", control group {cores['controlGroupLimit']:g}" if cores["controlGroupLimit"] is not None else ""
    allowed = f"{cores['physical']} cores" if cores["physical"] != cores["allowed"] else ""
    allowed = ", ".join(filter(None, (f"allowed {cores['allowed']}", allowed)))
    yield "cores", f"{cores['usable']} usable of {cores['present']} ({allowed}{bound})"
    limit = memory["controlGroupLimit"]
    bound = f", control group {render.size(limit)}" if limit is not None else ""
    yield "memory", f"{render.size(memory['available'])} free of {render.size(memory['total'])}{bound}"
    for gpu in devices["gpus"]:
        room = f"{render.size(gpu['available'])} free of {render.size(gpu['memory'])}"
        driver = f"driver {devices['driver']} (CUDA {devices['cuda'] or 'unknown'})"
        yield "device", f"cuda:{gpu['index']} {gpu['name']}, {room}, {driver}"
        yield "", _health(gpu)
    if not devices["gpus"]:
        yield "device", f"no GPU: {devices['problem'] or 'NVML reports none'}"
    elif devices["problem"]:
        yield "device", devices["problem"]


def _health(gpu: dict[str, Any]) -> str:
    """What a GPU tells of itself; `?` is what it does not."""

    def shown(value: Any, unit: str = "") -> str:
        return "?" if value is None else f"{value:.0f}{unit}"

    busy = None if gpu["utilization"] is None else gpu["utilization"] * 100
    parts = [
        f"busy {shown(busy, ' %')}",
        f"{shown(gpu['temperature'])} of {shown(gpu['slowdownTemperature'])} °C",
        f"{shown(gpu['power'])} of {shown(gpu['powerLimit'])} W",
        f"uncorrected memory errors {shown(gpu['eccErrors'])}, repairs {shown(gpu['repairs'])}",
        f"processes {shown(gpu['processes'])}",
    ]
    if gpu["slowedBy"]:
        parts.append(f"slowed by {', '.join(gpu['slowedBy'])}")
    return ", ".join(parts)


def _software(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    versions = {name: found or "missing" for name, found in report["versions"].items() if name != "executable"}
    yield "versions", ", ".join(f"{name} {found}" for name, found in versions.items())
    compiler = report["compiler"]
    found = f"{compiler['path']}: {compiler['problem'] or compiler['version']}" if compiler else "none found"
    yield "compiler", found
    for backend in report["kernels"]["backends"]:
        yield "kernels", f"{backend['name']} {'works' if backend['available'] else backend['reason']}"
    if report["kernels"]["problem"]:
        yield "kernels", report["kernels"]["problem"]


def _process(pid: int | None, answers: bool) -> str:
    if pid is None:
        return "not running"
    return f"pid {pid}, {'answers' if answers else 'does not answer'}"


def _store(store: dict[str, Any]) -> str:
    if not store["exists"]:
        return f"{store['path']}: not made yet"
    if store["bytes"] is None:
        return f"{store['path']}: {store['problem'] or 'answers'}"
    return f"{store['path']}: {render.size(store['bytes'] or 0)}, {store['problem'] or 'sound'}"
