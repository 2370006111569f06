"""What commands print, as pure functions: answers of the control plane in, lines of text out.

Nothing here asks for the time, the terminal or the network; `now` is Unix seconds. The few
formats of sizes and ages are written here rather than taken from `quire_schemas.quantities`, which would load
Pydantic for `get`. Views are the decoded JSON of the admin API: an object has kind, name, generation, intent,
resolved, createdAt, deleting, status and replicas.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

View = Mapping[str, Any]
STAGES = ("accepted", "weights", "device", "loaded", "ready")
LAST_LINES = 5
"""How much of the log of a replica that ended is shown with it."""


BYTES = frozenset({"kvCacheSize", "memoryPerReplica"})
"""Resolved figures that are bytes."""


# ── small things ──────────────────────────────────────────────────────────────────────────────────────────


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, each as wide as its widest cell; no trailing blanks."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]


def instant(when: str | float) -> float:
    """Unix seconds of a time as the API gives it: RFC 3339, or already a number."""
    return datetime.fromisoformat(when).timestamp() if isinstance(when, str) else float(when)


def age(then: str | float | None, now: float) -> str:
    """How long ago, in its one or two largest units: 4s, 3m58s, 2h10m, 12d."""
    if then is None:
        return "-"
    seconds = max(int(now - instant(then)), 0)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds}s" if minutes < 10 and seconds else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes}m" if hours < 10 and minutes else f"{hours}h"
    return f"{hours // 24}d"


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one: 4.1 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def scalar(value: object) -> str:
    """A field's value on one line: text as it is, the rest as JSON, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


OUTPUT_VERSION = "quire.dev/v1alpha1"
"""Of the shapes in `quire.cli.shapes`."""


def versioned(value: View, kind: str | None) -> dict[str, Any]:
    """An answer for a program, with the version of its shape and, unless it is an object, its kind."""
    return {"apiVersion": OUTPUT_VERSION, **({} if kind is None else {"kind": kind}), **value}


def dump(value: View, output: str, kind: str | None) -> None:
    """Print an answer for a program, in one of the shapes of `quire.cli.shapes`."""
    value = versioned(value, kind)
    if output == "yaml":
        import yaml

        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")
    else:
        print(json.dumps(value, indent=2, ensure_ascii=False))


def key_of(view: View) -> str:
    return f"{view['kind'].lower()}/{view['name']}"


def label(view: View) -> str:
    """What lines of progress call an object: a model by its name, anything else by its key."""
    name: str = view["name"] if view["kind"].lower() == "model" else key_of(view)
    return name


def condition(view: View, kind: str) -> View | None:
    """The condition of that type, or None if it has not been set yet."""
    for item in view["status"].get("conditions", ()):
        if item["type"] == kind:
            found: View = item
            return found
    return None


def is_true(view: View, kind: str) -> bool:
    """Whether that condition holds for the current generation."""
    found = condition(view, kind)
    return found is not None and found["status"] == "True" and found["observedGeneration"] >= view["generation"]


# ── problems in manifests ─────────────────────────────────────────────────────────────────────────────────


def problem_lines(problems: Iterable[View]) -> list[str]:
    """`file:line:col: error: path: message`, and the remedy indented below it."""
    lines = []
    for problem in problems:
        place = problem["file"]
        if problem.get("line"):
            place += f":{problem['line']}"
            if problem.get("col"):
                place += f":{problem['col']}"
        path = f"{problem['path']}: " if problem.get("path") else ""
        lines.append(f"{place}: error: {path}{problem['message']}")
        if problem.get("hint"):
            lines.append(f"    hint: {problem['hint']}")
    return lines


def problem_annotations(problems: Iterable[View]) -> list[str]:
    """The same as workflow commands, which GitHub shows beside the line."""

    def escape(text: str, *, in_property: bool = False) -> str:
        text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        return text.replace(":", "%3A").replace(",", "%2C") if in_property else text

    lines = []
    for problem in problems:
        where = f"file={escape(problem['file'], in_property=True)}"
        if problem.get("line"):
            where += f",line={problem['line']}"
            if problem.get("col"):
                where += f",col={problem['col']}"
        text = f"{problem['path']}: {problem['message']}" if problem.get("path") else problem["message"]
        if problem.get("hint"):
            text += f"\nhint: {problem['hint']}"
        lines.append(f"::error {where}::{escape(text)}")
    return lines


# ── get ───────────────────────────────────────────────────────────────────────────────────────────────────


def models(views: Sequence[View], now: float) -> list[str]:
    """One row a model."""
    rows = []
    for view in views:
        status = view["status"]
        replicas = status.get("replicas", {})
        desired, ready, live = (replicas.get(name, 0) for name in ("desired", "ready", "live"))
        surplus = f"+{live - desired}" if live > desired else ""
        rows.append(
            [
                view["name"],
                str(is_true(view, "Ready")),
                str(is_true(view, "RolledOut")),
                f"{ready}/{desired}{surplus}",
                scalar(status.get("servedRevision")),
                ("Deleting: " if view["deleting"] else "") + status.get("summary", ""),
                age(view["createdAt"], now),
            ]
        )
    return table(("NAME", "READY", "ROLLED OUT", "REPLICAS", "REV", "STATUS", "AGE"), rows)


def models_wide(views: Sequence[View], now: float) -> list[str]:
    """One row a model, with what its replicas are made of."""
    lines = models(views, now)
    rows = []
    for view in views:
        found = view["status"].get("resolved") or {}
        memory = found.get("memoryPerReplica")
        rows.append(
            [
                scalar(found.get("device")),
                scalar(found.get("quantization") or found.get("dtype")),
                scalar(found.get("maxModelLen")),
                "-" if memory is None else size(memory),
                ",".join((view["status"].get("endpoints") or {}).get("modelNames") or ()),
                scalar(view["resolved"].get("source")),
            ]
        )
    more = table(("DEVICE", "DTYPE", "MAX LEN", "MEMORY", "MODEL NAMES", "SOURCE"), rows)
    width = max(len(line) for line in lines) + 2
    return [f"{left:<{width}}{right}" for left, right in zip(lines, more, strict=True)]


def names(views: Sequence[View], now: float) -> list[str]:
    """The keys alone, for scripts."""
    return [key_of(view) for view in views]


def replicas(views: Sequence[View], now: float) -> list[str]:
    """One row a replica, of all models."""
    rows = [
        [
            replica["id"],
            view["name"],
            str(replica["revision"]),
            replica["state"],
            scalar(replica.get("pid")),
            str(replica["incarnation"]),
            ",".join(str(device) for device in replica.get("devices") or ()) or "-",
            age(replica.get("since"), now),
            replica.get("message") or "",
        ]
        for view in views
        for replica in view.get("replicas", ())
    ]
    return table(("REPLICA", "MODEL", "REV", "STATE", "PID", "INCARNATION", "DEVICES", "SINCE", "MESSAGE"), rows)


def revisions(views: Sequence[View], now: float) -> list[str]:
    """One row a revision, newest first, of all models."""
    rows = [
        [
            view["name"],
            str(revision["revision"]),
            revision["templateHash"][:12],
            revision["state"],
            age(revision.get("createdAt"), now),
        ]
        for view in views
        for revision in view.get("revisions", ())
    ]
    return table(("MODEL", "REV", "TEMPLATE", "STATE", "AGE"), rows)


def history(view: View, now: float) -> list[str]:
    """One row a revision of a model, newest first, with what became of it."""
    rows = [
        [
            str(revision["revision"]),
            revision["templateHash"][:12],
            revision["state"],
            revision["cause"],
            age(revision.get("createdAt"), now),
            revision.get("failure") or "",
        ]
        for revision in view.get("revisions", ())
    ]
    return table(("REV", "TEMPLATE", "STATE", "CAUSE", "AGE", "FAILURE"), rows)


def rollout(view: View) -> list[str]:
    """Where a model's rollout stands."""
    status = view["status"]
    going, counts = status.get("rollout") or {}, status.get("replicas") or {}
    lines = [f"{key_of(view)}  {status.get('summary', '')}"]
    newest = max((revision["revision"] for revision in view.get("revisions", ())), default=None)
    told = [f"revision {going.get('revision', '-')} is to serve", f"{scalar(status.get('servedRevision'))} serves"]
    if newest is not None and newest != going.get("revision"):
        told.append(f"the manifest says {newest}")
    lines.append(f"  {', '.join(told)}")
    parts = [f"{counts[name]} {name}" for name in ("desired", "ready", "updated", "draining") if name in counts]
    if parts:
        lines.append(f"  replicas: {', '.join(parts)}")
    rolled = condition(view, "RolledOut")
    if rolled is not None and rolled["status"] != "True" and rolled["message"]:
        lines.append(f"  {rolled['reason']}: {rolled['message']}")
    if (canary := going.get("canary")) is not None:
        exam = canary.get("exam")
        if exam is not None and not (rolled is not None and exam["text"] in rolled["message"]):
            lines.append(f"  exam against revision {exam.get('against', '-')}: {exam['text']}")
        lines += [f"  {line}" for line in gates(canary)]
    return lines + [f"  {line}" for line in overrides(view)]


def gates(canary: Mapping[str, Any]) -> list[str]:
    """How a canary does beside the stable revision: a table, empty before it has begun."""
    rows = []
    for gate in canary["gates"]:
        values = [_gate_value(gate, gate[which]) for which in ("stable", "new")]
        limit = f"+{gate['limit']:.0%}" if gate["relative"] else f"{gate['limit']:.1%}"
        rows.append((gate["name"], *values, limit, "beyond" if gate["beyond"] else "within"))
    return table(("GATE", "STABLE", "CANARY", "LIMIT", "STATE"), rows) if rows else []


def _gate_value(gate: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.0f} ms" if gate["relative"] else f"{value:.1%}"


def overrides(view: View) -> list[str]:
    """What was decided about a model beside its manifest, a line each."""
    lines = []
    for item in view["status"].get("overrides") or ():
        what = {
            "scale": f"scaled to {item.get('replicas')}",
            "autoscale": f"scaled to {item.get('replicas')} with the load",
            "pause": "paused",
            "hold": "rollouts paused",
            "pin": f"pinned to revision {item.get('revision')}",
            "quarantine": f"revision {item.get('revision')} given up",
            "restart": "restarted",
            "resident": "in memory",
            "suspend": "suspended",
        }[item["kind"]]
        until = f" until {item['until']}" if item.get("until") else ""
        why = f": {item['reason']}" if item["reason"] else ""
        lines.append(f"{what} by {item['by']} {item['since']}{until}{why}")
    return lines


def _base_url(view: View) -> str | None:
    """Where requests go, if anything listens there."""
    endpoints = view["status"].get("endpoints") or {}
    return None if endpoints.get("unavailable") else endpoints.get("openai")


def routes(views: Sequence[View], now: float) -> list[str]:
    """One row a route."""
    rows = []
    for view in views:
        match, backends = view["resolved"]["match"], view["resolved"]["backends"]
        headers = [f"{header['name']}: {header['exact']}" for header in match["headers"]]
        rows.append(
            [
                view["name"],
                str(is_true(view, "Ready")),
                ",".join(match["modelNames"]) + (f" ({', '.join(headers)})" if headers else ""),
                ",".join(f"{_backend(backend)}={backend['weight']}" for backend in backends),
                view["status"].get("summary", ""),
                age(view["createdAt"], now),
            ]
        )
    return table(("NAME", "READY", "MODEL NAMES", "BACKENDS", "STATUS", "AGE"), rows)


def _backend(backend: View) -> str:
    """As requests name it."""
    adapter = backend.get("adapter")
    return str(backend["model"]) if adapter is None else f"{backend['model']}:{adapter}"


def gateways(views: Sequence[View], now: float) -> list[str]:
    """One row: there is one gateway."""
    rows = [
        [
            view["name"],
            str(is_true(view, "Ready")),
            scalar(_base_url(view)),
            view["status"].get("summary", ""),
            age(view["createdAt"], now),
        ]
        for view in views
    ]
    return table(("NAME", "READY", "BASE URL", "STATUS", "AGE"), rows)


def policies(views: Sequence[View], now: float) -> list[str]:
    """One row a policy."""
    rows = []
    for view in views:
        keys, allow = view["status"].get("keys", ()), view["resolved"]["allow"]
        rows.append(
            [
                view["name"],
                str(is_true(view, "Ready")),
                f"{sum(key['works'] for key in keys)}/{len(view['resolved']['keys'])}",
                ", ".join(allow["models"]) or "all",
                ", ".join(allow["operations"]) or "all",
                scalar(view["resolved"]["expiresAt"]),
                view["status"].get("summary", ""),
                age(view["createdAt"], now),
            ]
        )
    return table(("NAME", "READY", "KEYS", "MODELS", "OPERATIONS", "EXPIRES", "STATUS", "AGE"), rows)


def sources(views: Sequence[View], now: float) -> list[str]:
    """One row a git source."""
    rows = []
    for view in views:
        status = view["status"]
        rows.append(
            [
                view["name"],
                str(is_true(view, "Ready")),
                status.get("ref", ""),
                (status.get("lastAppliedRevision") or "-")[:12],
                str(len(status.get("objects", ()))),
                status.get("summary", ""),
                age(view["createdAt"], now),
            ]
        )
    return table(("NAME", "READY", "FOLLOWS", "APPLIED", "OBJECTS", "STATUS", "AGE"), rows)


def syncs(view: View, now: float) -> list[str]:
    """One row a commit that a source tried, newest first, with what it changed or why it was refused."""
    rows = [
        [
            entry["commit"][:12],
            age(entry["at"], now),
            entry["result"],
            ", ".join(entry["changed"]) or entry["message"] or "no change",
            entry["subject"],
        ]
        for entry in view["status"].get("history", ())
    ]
    return table(("COMMIT", "WHEN", "RESULT", "WHAT", "SUBJECT"), rows)


# ── describe ──────────────────────────────────────────────────────────────────────────────────────────────


def describe(view: View, events: Sequence[View], now: float) -> list[str]:
    """Everything a person asks about one object, the remedies included."""
    status = view["status"]
    observed = status.get("observedGeneration", 0)
    created = f"created {age(view['createdAt'], now)} ago" if view["createdAt"] else "by default, no manifest"
    lines = [
        f"{view['kind'].capitalize()} {view['name']}   generation {view['generation']} (observed {observed})"
        f"   {created}" + ("   deleting" if view["deleting"] else "")
    ]
    if status.get("summary"):
        lines.append(f"Status       {status['summary']}")
    if (manager := view.get("managedBy")) is not None:
        lines.append(f"Managed by   {manager['source']} @ {manager['commit'][:7]}, {manager['file']}")
    endpoints = status.get("endpoints") or {}
    if (url := _base_url(view)) is not None:
        lines.append(f"Base URL     {url}")
    elif endpoints.get("unavailable"):
        more = " (platform describe gateway/default)" if view["kind"].lower() == "model" else ""
        lines.append(f"Base URL     none now: {endpoints['unavailable']}{more}")
    if endpoints.get("modelNames"):
        lines.append(f"Model names  {', '.join(endpoints['modelNames'])}")
    workers = status.get("workers") or {}
    if workers.get("wanted", 1) > 1:
        lines.append(f"Workers      {workers['serving']} of {workers['wanted']}")
    conditions = status.get("conditions", ())
    if conditions:
        lines.append("Conditions")
        rows = [
            [
                item["type"],
                item["status"],
                item["reason"],
                age(item.get("lastTransitionTime"), now),
                item["message"],
            ]
            for item in conditions
        ]
        lines += _indent(table(("", "", "", "", ""), rows)[1:])
    if decided := overrides(view):
        lines.append("Decided beside the manifest")
        lines += _indent(decided)
    if status.get("keys"):
        lines.append("Keys")
        rows = [
            [key["name"], str(key["works"]), key["id"] or "-", key["source"], key["problem"]]
            for key in status["keys"]
        ]
        lines += _indent(table(("NAME", "WORKS", "ID", "SOURCE", "PROBLEM"), rows))
    if status.get("problems"):
        lines.append(f"Problems in commit {status['lastAttemptedRevision'][:12]}")
        lines += _indent(problem_lines(status["problems"]))
    if status.get("kept"):
        lines.append("Left the repository, and kept")
        lines += _indent(status["kept"])
    if status.get("objects"):
        lines.append("Objects")
        rows = [[item["key"], item["commit"][:12], item["file"]] for item in status["objects"]]
        lines += _indent(table(("OBJECT", "COMMIT", "FILE"), rows))
    if status.get("history"):
        lines.append("History")
        lines += _indent(syncs(view, now))
    if view.get("replicas"):
        lines.append("Replicas")
        lines += _indent(replicas([view], now))
        for replica in view["replicas"]:
            lines += _lost_words(replica) + _last_words(replica)
    if status.get("resolved"):
        lines.append("Resolved")
        shown = {**status["resolved"]}
        for name in BYTES & shown.keys():
            shown[name] = size(shown[name])
        lines += _indent(_pairs(shown.items()))
    if view["generation"]:
        lines.append("Spec (as submitted)")
        lines += _indent(_pairs(flatten(view["intent"].get("spec", {}))))
    else:
        lines.append("Spec (defaults)")
        lines += _indent(_pairs(flatten(view["resolved"])))
    if status.get("remedies"):
        lines.append("What you can do")
        lines += _indent(status["remedies"])
    if events:
        lines.append(f"Events (last {len(events)})")
        lines += _indent(event_lines(events, now)[1:])
    return lines


def _lost_words(replica: View) -> list[str]:
    """That its log has gaps."""
    lost = replica.get("logLost", 0)
    return (
        [f"{replica['id']} has lost {size(lost)} of its log: it cannot be, or could not be, written"]
        if lost
        else []
    )


def _last_words(replica: View) -> list[str]:
    """How a replica that does not serve last ended, with the end of its log."""
    ended = replica.get("lastExit")
    if ended is None or replica["state"] == "Ready":
        return []
    said = [f"  {line}" for line in ended["log"][-LAST_LINES:]]
    return [f"{replica['id']} last ended by {ended['reason']}: {ended['message']}", *said]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested mapping with their dotted paths, in order."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        leaves += flatten(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
    return leaves


def _pairs(items: Iterable[tuple[str, Any]]) -> list[str]:
    pairs = [(name, scalar(value)) for name, value in items]
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in pairs]


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


# ── cache ─────────────────────────────────────────────────────────────────────────────────────────────────


def cache(items: Sequence[View], now: float) -> list[str]:
    """One row a snapshot of a repository."""
    rows = []
    for item in items:
        unfinished = f" + {size(item['incompleteBytes'])} unfinished" if item["incompleteBytes"] else ""
        users = item["usedBy"] or [f"({name}, an older revision)" for name in item["formerlyUsedBy"]]
        rows.append(
            [
                item["source"],
                item["commit"][:12],
                ",".join(item["refs"]) or "-",
                f"{size(item['bytes'])}{unfinished}",
                ", ".join(users) or "-",
                age(item["lastUsed"], now),
                size(item["prunableBytes"]) if item["prunableBytes"] else "-",
            ]
        )
    return table(("SOURCE", "COMMIT", "REFS", "SIZE", "USED BY", "LAST USED", "PRUNABLE"), rows)


# ── events ────────────────────────────────────────────────────────────────────────────────────────────────


def event_lines(events: Sequence[View], now: float) -> list[str]:
    header = ("LAST SEEN", "TYPE", "REASON", "COUNT", "OBJECT", "MESSAGE")
    return table(header, [_event_cells(event, now) for event in events])


def event_line(event: View, now: float) -> str:
    """One event that is shown alone: its columns stand where those of the usual ones before and after it do."""
    cells = _event_cells(event, now)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (9, 7, 14, 5, 20, 0), strict=True))


def _event_cells(event: View, now: float) -> list[str]:
    return [
        age(event["lastSeen"], now),
        event["type"],
        event["reason"],
        f"x{event['count']}" if event["count"] > 1 else "",
        event["object"],
        event["message"],
    ]


# ── plan ──────────────────────────────────────────────────────────────────────────────────────────────────


def plan(report: View) -> list[str]:
    """What apply would do: each object's changes, how they roll out, how it fits, and the totals."""
    lines: list[str] = []
    for item in report["items"]:
        lines += _plan_item(item)
    if report.get("room"):  # none from a control plane of an earlier version
        lines += _room(report["room"], {item["key"] for item in report["items"]})
    totals = report["summary"]
    refused = f", {totals['refused']} refused" if totals.get("refused") else ""
    lines.append(
        f"Plan: {totals['create']} to create, {totals['update']} to update, {totals.get('delete', 0)} to delete"
        f"{refused}."
    )
    return lines


def _plan_item(item: View) -> list[str]:
    old, new = item.get("revision") or (None, None)
    heading = item["action"]
    if item["action"] == "create":
        heading = "create" + (f" (revision {new})" if new is not None else "")
    elif item["action"] == "update":
        stays = f" (revision {old} stays)" if old is not None else ""
        heading = f"revision {old} → {new}" if old != new else f"update{stays}"
    lines = [f"{item['key']}  {heading}"]
    if item["action"] != "create":
        lines += _changes(item)
    if item.get("rollout"):
        lines += _labelled("Rollout", item["rollout"].splitlines())
    fit = item.get("fit")
    if fit:
        lines += _labelled("Memory", fit.get("lines", ()))
    for finding in item.get("findings") or ():
        lines += _labelled("Finding", finding.splitlines())
    for note in item.get("notes") or ():
        lines += _labelled("Note", note.splitlines())
    for warning in item.get("warnings") or ():
        lines += _labelled("Warning", f"⚠ {warning}".splitlines())
    problem = item.get("problem")
    if problem:
        place = f"{problem['file']}:{problem['line']}:{problem['col']}: " if problem.get("file") else ""
        path = f"{problem['path']}: " if problem.get("path") else ""
        lines += _labelled("Refused", f"{place}{path}{problem['message']}".splitlines())
        if problem.get("hint"):
            lines.append(f"    hint: {problem['hint']}")
    return lines


def _changes(item: View) -> list[str]:
    cells = []
    for change in item.get("changes") or ():
        before, after = change.get("old"), change.get("new")
        sign = "+" if before is None else "-" if after is None else "~"
        values = scalar(after) if before is None else f"{scalar(before)} → {scalar(after)}"
        note = f" ({change['note']})" if change.get("note") else ""
        cells.append([f"{sign} {change['path']}", values, f"{change['update']}{note}"])
    return _indent(table(("", "", ""), cells)[1:])


def differences(items: Sequence[View]) -> list[str]:
    """In what manifests differ from what was applied, an object after the other; nothing of those that do not."""
    lines = []
    for item in items:
        if item["intent"] is not None:
            lines.append(f"{item['key']}  was not applied yet")
            lines += [f"  + {line}" for line in _pairs(flatten({"spec": item["intent"].get("spec", {})}))]
        elif item["changes"]:
            lines += [item["key"], *_changes(item)]
    return lines


def _room(after: View, planned: Collection[str]) -> list[str]:
    """What each device holds once all is applied, where it is shared: for one model its own figures say it. Models
    that are not `planned` are one line.
    """
    devices, waiting, guests = after["devices"], after["waiting"], after["onDemand"]
    keys = {item["key"] for device in devices for item in device["models"]}
    if len(keys | {item["key"] for item in [*waiting, *guests]}) < 2:
        return []
    lines = ["Memory once this is applied"]
    for device in devices:
        foreign = f", others hold {size(device['foreign'])}" if device["foreign"] else ""
        lines.append(
            f"  {device['device']}: {size(device['total'])}{foreign}; replicas may take {size(device['limit'])}"
        )
        rows = []
        others = [item for item in device["models"] if item["key"] not in planned]
        if len(others) > 1:
            whole = sum(item["replicas"] * item["memory"] for item in others)
            rows.append([f"{len(others)} others", size(whole), "as they are"])
        for item in device["models"]:
            if len(others) > 1 and item in others:
                continue
            rest = item["memory"] - item["weights"] - item["kv"]
            each = f"weights {size(item['weights'])} + cache {size(item['kv'])} + the rest {size(rest)}"
            surge = f", and {item['surge']} more while it rolls out" if item["surge"] else ""
            whole = item["replicas"] * item["memory"]
            rows.append([item["key"], size(whole), f"{item['replicas']} × ({each}){surge}"])
        lines += _indent(_indent(table(("", "", ""), [*rows, ["free", size(device["free"]), ""]])[1:]))
    for item in waiting:
        lines.append(f"  {item['key']}: {count(item['replicas'], 'replica')} will wait as {item['reason']}")
    for item in guests:
        lines.append(
            f"  {item['key']}: on demand, {item['replicas']} × {size(item['memory'])} where others leave room"
        )
    return lines


def _labelled(label: str, text: Iterable[str]) -> list[str]:
    """The label before the first line; the others aligned below it."""
    return [f"  {label if number == 0 else '':<8} {line}".rstrip() for number, line in enumerate(text)]


# ── progress of a rollout ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Stage:
    """One step on the way to being served. `detail` tells what (4.1 MiB, cpu), `seconds` when, since apply."""

    name: str
    done: bool
    detail: str = ""
    seconds: float | None = None
    tenths: int = 0
    """How many tenths of its bytes are done."""

    def text(self) -> str:
        took = f"{self.seconds:.1f}s" if self.done and self.seconds is not None else ""
        return " ".join(part for part in (self.name, self.detail, took) if part)


def stages(view: View) -> list[Stage]:
    """The five steps of a model's current generation, in order; those not yet begun are not done."""
    if view["kind"].lower() != "model":
        return []
    progress = view["status"].get("progress") or {}
    found = []
    for name in STAGES:
        step = progress.get(name)
        if step is None:
            found.append(Stage(name, False))
            continue
        detail = ""
        total, done = step.get("bytes"), step.get("bytesDone")
        if total and done is not None and not step["ok"]:
            detail = f"{size(done)} of {size(total)}"
            if step.get("rate"):
                detail += f", {size(step['rate'])}/s"
        elif total and name == "weights":
            detail = size(total)
        elif name == "device":
            detail = step.get("device") or ""
        tenths = 10 * (done or 0) // total if total else 0
        found.append(Stage(name, bool(step["ok"]), detail, step.get("seconds"), tenths))
    return found


def is_starting_again(view: View) -> bool:
    """Whether the steps of its apply are all done and it does not serve: they say nothing about now."""
    steps = stages(view)
    return bool(steps) and all(stage.done for stage in steps) and not is_true(view, "Ready")


def progress_line(view: View, width: int, waits: str | None = None) -> str:
    """One object's progress on one line of at most `width` characters, for a terminal that redraws. `waits`: what
    it is waited for, where that is not what its summary says.

    Too narrow a line loses the earliest steps first: what is at work is at its end.
    """
    steps = stages(view)
    working = next((stage for stage in steps if not stage.done), None)
    settled = is_true(view, "Ready")
    done = [f"✔ {stage.text()}" for stage in steps if stage.done and not is_starting_again(view)]
    tail = [f"… {working.text()}"] if working else []
    summary = waits or view["status"].get("summary")
    if summary and (waits or not settled):
        tail.append(f"({summary})" if tail else f"… {summary}")
    elif not steps:
        tail.append(f"✔ {summary}" if summary else "…")
    line = "  ".join([label(view), *done, *tail])
    while done and len(line) > width:
        done.pop(0)
        line = "  ".join([label(view), *done, *tail])
    return line if len(line) <= width else line[: width - 1] + "…"


def curl_options(endpoints: View) -> str:
    """What curl is to be told of the certificate and of a key, where there is one and the other."""
    certificate = endpoints.get("certificate")
    trust = "" if certificate is None else f" --cacert {shlex.quote(certificate)}"
    return trust + (' -H "authorization: Bearer $KEY"' if endpoints.get("keys") else "")


def endpoint_lines(views: Sequence[View]) -> list[str]:
    """Where to send a first request, as a command to paste."""
    for view in views:
        endpoints = view["status"].get("endpoints") or {}
        if _base_url(view) and endpoints.get("modelNames"):
            body = json.dumps(
                {"model": endpoints["modelNames"][0], "messages": [{"role": "user", "content": "hi"}]},
                separators=(",", ":"),
            )
            keys = " (with a key of an AccessPolicy, here in $KEY)" if endpoints.get("keys") else ""
            url = f"{endpoints['openai']}/chat/completions"
            return [
                f"Base URL {endpoints['openai']}{keys}",
                f"  curl -s{curl_options(endpoints)} {url} -H 'content-type: application/json' \\",
                f"    -d '{body}'",
            ]
    return []
