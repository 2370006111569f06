"""The text of every command, from answers given here in full: no process, no clock, no terminal."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
from tests.unit.platform.api_views import NOW, condition, model

from quire.cli import render
from quire.cli.progress import Display, Verdict, judge, rolled_out, settled, succeeded, wait
from quire.cli.source import judge_commit
from quire.client import Client, clean_environment


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59, "59s"),
        (60, "1m"),
        (238, "3m58s"),
        (660, "11m"),
        (7800, "2h10m"),
        (86400 * 12, "12d"),
        (-5, "0s"),
    ],
)
def test_age_names_one_or_two_units(seconds: float, text: str) -> None:
    assert render.age(NOW - seconds, NOW) == text


def test_age_reads_both_forms_of_a_time() -> None:
    assert render.age("2027-01-15T07:59:30Z", NOW) == render.age(NOW - 30, NOW) == "30s"
    assert render.age(None, NOW) == "-"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (4_300_000, "4.1 MiB"), (1 << 41, "2.0 TiB")],
)
def test_sizes_take_the_largest_unit(count: int, text: str) -> None:
    assert render.size(count) == text


def test_a_table_is_aligned_and_has_no_trailing_blanks() -> None:
    assert render.table(("NAME", "READY"), [("a-long-name", "True"), ("b", "")]) == [
        "NAME         READY",
        "a-long-name  True",
        "b",
    ]


def test_get_shows_the_columns_of_the_design() -> None:
    busy = model(
        name="llama-70b",
        generation=8,
        createdAt=NOW - 86400 * 12,
        status={
            "summary": "Updating 1/2",
            "servedRevision": 8,
            "replicas": {"desired": 2, "live": 3, "ready": 2, "updated": 1, "draining": 1},
            "conditions": [
                condition("Ready", "True", generation=8),
                condition("RolledOut", "False", generation=8),
            ],
        },
    )
    new = model(name="new", status={"summary": "", "servedRevision": None, "replicas": {}, "conditions": []})
    assert render.models([busy, model(), new], NOW) == [
        "NAME        READY  ROLLED OUT  REPLICAS  REV  STATUS        AGE",
        "llama-70b   True   False       2/2+1     8    Updating 1/2  12d",
        "quickstart  True   True        1/1       1    Serving       4m",
        "new         False  False       0/0       -                  4m",
    ]


def test_a_condition_of_an_older_generation_does_not_count() -> None:
    assert not render.is_true(model(generation=2), "Ready")


def test_problems_name_the_place_and_the_remedy() -> None:
    problems: list[dict[str, Any]] = [
        {
            "file": "a.yml",
            "line": 7,
            "col": 3,
            "path": "spec.x",
            "message": "unknown field",
            "hint": "did you mean 'y'?",
        },
        {"file": "gone.yml", "line": None, "col": None, "path": "", "message": "no such file", "hint": None},
    ]
    assert render.problem_lines(problems) == [
        "a.yml:7:3: error: spec.x: unknown field",
        "    hint: did you mean 'y'?",
        "gone.yml: error: no such file",
    ]
    assert render.problem_annotations(problems) == [
        "::error file=a.yml,line=7,col=3::spec.x: unknown field%0Ahint: did you mean 'y'?",
        "::error file=gone.yml::no such file",
    ]


def test_an_annotation_cannot_break_out_of_its_line() -> None:
    problem = {"file": "a:b,c%.yml", "line": 1, "col": 1, "path": "", "message": "x\n::error::y 50%", "hint": None}
    assert render.problem_annotations([problem]) == [
        "::error file=a%3Ab%2Cc%25.yml,line=1,col=1::x%0A::error::y 50%25"
    ]


NO_ROOM: dict[str, Any] = {"devices": [], "waiting": [], "onDemand": []}


def plan_item(name: str, action: str, **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"revision": [None, 1], "changes": [], "fit": None, "rollout": "", "notes": []}
    return {"key": f"model/{name}", "action": action, **empty, "problem": None, **more}


def change(path: str, old: object, new: object, note: str = "") -> dict[str, Any]:
    return {"path": path, "old": old, "new": new, "update": "rolling", "note": note}


def test_plan_shows_changes_with_their_class_the_rollout_and_the_arithmetic() -> None:
    changes = [
        change("spec.engine.maxModelLen", 16384, 32768),
        change("spec.batching.maxNumSeqs", 128, 256, "engine allocated for 128"),
        change("spec.env", None, [1]),
    ]
    report = {
        "items": [
            plan_item(
                "llama",
                "update",
                revision=[7, 8],
                changes=changes,
                fit={"lines": ["weights 1 GiB + KV 2 GiB", "room for 4k tokens"]},
                rollout="RollingUpdate, surge 0, unavailable 1",
            ),
            plan_item("same", "unchanged", revision=[1, 1]),
            plan_item(
                "huge",
                "refused",
                problem={"path": "spec.engine", "message": "does not fit", "hint": "lower maxModelLen"},
            ),
        ],
        "room": NO_ROOM,
        "summary": {"create": 0, "update": 1, "delete": 0},
    }
    assert render.plan(report) == [
        "model/llama  revision 7 → 8",
        "  ~ spec.engine.maxModelLen   16384 → 32768  rolling",
        "  ~ spec.batching.maxNumSeqs  128 → 256      rolling (engine allocated for 128)",
        "  + spec.env                  [1]            rolling",
        "  Rollout  RollingUpdate, surge 0, unavailable 1",
        "  Memory   weights 1 GiB + KV 2 GiB",
        "           room for 4k tokens",
        "model/same  unchanged",
        "model/huge  refused",
        "  Refused  spec.engine: does not fit",
        "    hint: lower maxModelLen",
        "Plan: 0 to create, 1 to update, 0 to delete.",
    ]


def test_plan_adds_up_what_is_on_a_device_that_models_share() -> None:
    mib, gib = 1 << 20, 1 << 30
    shares = {"memory": gib, "weights": 600 * mib, "kv": 400 * mib, "surge": 0}
    one = {**shares, "key": "model/a", "replicas": 2, "surge": 1}
    cpu = {"device": "cpu", "total": 16 * gib, "foreign": 0, "limit": 14 * gib, "free": 12 * gib, "models": [one]}
    report: dict[str, Any] = {
        "items": [], "room": {**NO_ROOM, "devices": [cpu]}, "summary": {"create": 0, "update": 0},
    }  # fmt: skip
    planned = {"model/a", "model/other"}
    assert len(render.plan(report)) == 1, "of one model its own figures say it"
    assert len(render.plan({key: value for key, value in report.items() if key != "room"})) == 1
    two = {**shares, "key": "model/other", "replicas": 1}
    gpu = {**cpu, "device": "cuda:0", "total": 24 * gib, "foreign": gib, "limit": 23 * gib, "free": 22 * gib}
    gpu["models"] = [two]
    report["room"] = {
        "devices": [{**cpu, "free": 11 * gib, "models": [one, two]}, gpu],
        "waiting": [{"key": "model/big", "replicas": 2, "reason": "InsufficientMemory"}],
        "onDemand": [{"key": "model/rare", "replicas": 1, "memory": 2 * gib}],
    }
    assert render._room(report["room"], planned) == [
        "Memory once this is applied",
        "  cpu: 16.0 GiB; replicas may take 14.0 GiB",
        "    model/a      2.0 GiB   2 × (weights 600.0 MiB + cache 400.0 MiB + the rest 24.0 MiB), "
        "and 1 more while it rolls out",
        "    model/other  1.0 GiB   1 × (weights 600.0 MiB + cache 400.0 MiB + the rest 24.0 MiB)",
        "    free         11.0 GiB",
        "  cuda:0: 24.0 GiB, others hold 1.0 GiB; replicas may take 23.0 GiB",
        "    model/other  1.0 GiB   1 × (weights 600.0 MiB + cache 400.0 MiB + the rest 24.0 MiB)",
        "    free         22.0 GiB",
        "  model/big: 2 replicas will wait as InsufficientMemory",
        "  model/rare: on demand, 1 × 2.0 GiB where others leave room",
    ]
    assert render._room(report["room"], {"model/new"})[2:4] == [
        "    2 others  3.0 GiB   as they are",
        "    free      11.0 GiB",
    ]


def test_progress_is_one_line_with_each_step_and_its_time() -> None:
    assert render.progress_line(model(), 200) == (
        "quickstart  ✔ accepted 0.0s  ✔ weights 4.1 MiB 0.1s  ✔ device cpu 0.1s  ✔ loaded 1.2s  ✔ ready 3.4s"
    )


def test_progress_shows_the_step_at_work_and_fits_the_terminal() -> None:
    done = {"ok": True, "seconds": 0.01}
    loading = model(
        status={
            "summary": "Starting 0/1",
            "progress": {
                "accepted": done,
                "weights": {**done, "bytes": 4096},
                "device": {**done, "device": "cpu"},
                "loaded": {"ok": False, "seconds": None, "bytes": 4096, "bytesDone": 1024},
                "ready": None,
            },
            "conditions": [],
        }
    )
    assert render.progress_line(loading, 200) == (
        "quickstart  ✔ accepted 0.0s  ✔ weights 4.0 KiB 0.0s  ✔ device cpu 0.0s"
        "  … loaded 1.0 KiB of 4.0 KiB  (Starting 0/1)"
    )
    assert render.progress_line(loading, 60) == "quickstart  … loaded 1.0 KiB of 4.0 KiB  (Starting 0/1)"
    cut = render.progress_line(loading, 20)
    assert len(cut) == 20
    assert cut.endswith("…")


def test_progress_of_a_replica_that_starts_again_does_not_claim_old_steps() -> None:
    again = model(status={"summary": "Starting 0/1", "conditions": [condition("Ready", "False")]})
    assert render.progress_line(again, 80) == "quickstart  … Starting 0/1"


def test_row_21_describe_ends_with_what_one_can_do_about_a_stall() -> None:
    stalled = model(
        status={
            "summary": "Stalled: InsufficientMemory",
            "remedies": ["lower spec.replicas"],
            "resolved": {"kvCacheSize": 384 << 20, "threads": 2},
            "conditions": [condition("Stalled", "True", "InsufficientMemory", "needs 9 GiB")],
        }
    )
    event = {
        "id": 1, "type": "Warning", "reason": "InsufficientMemory", "object": "model/quickstart",
        "message": "needs 9 GiB", "count": 7, "firstSeen": NOW - 300, "lastSeen": NOW - 238,
    }  # fmt: skip
    text = render.describe(stalled, [event], NOW)
    assert text[0] == "Model quickstart   generation 1 (observed 1)   created 4m ago"
    assert "  Stalled  True  InsufficientMemory  30s  needs 9 GiB" in text
    assert text[text.index("Resolved") + 1 :][:2] == ["  kvCacheSize  384.0 MiB", "  threads      2"]
    assert text[text.index("What you can do") + 1] == "  lower spec.replicas"
    assert text[-1] == "  3m58s      Warning  InsufficientMemory  x7     model/quickstart  needs 9 GiB"


def test_describe_shows_the_last_words_of_a_replica_that_does_not_serve() -> None:
    replica = {
        "id": "q-r1-0", "revision": 1, "state": "Backoff", "incarnation": 3, "restarts": 3, "pid": None,
        "since": NOW - 5, "message": "killed by SIGSEGV", "reason": "ProcessEnded", "devices": ["cpu"],
        "lastExit": {
            "reason": "ProcessEnded", "message": "killed by SIGSEGV", "log": [f"line {n}" for n in range(9)]
        },
    }  # fmt: skip
    text = render.describe({**model(), "replicas": [replica]}, [], NOW)
    start = text.index("q-r1-0 last ended by ProcessEnded: killed by SIGSEGV")
    assert text[start + 1 : start + 6] == [f"  line {n}" for n in range(4, 9)]
    serving = {**replica, "state": "Ready"}
    assert "last ended" not in "\n".join(render.describe({**model(), "replicas": [serving]}, [], NOW))


def test_endpoint_lines_are_a_command_to_paste() -> None:
    lines = render.endpoint_lines([model(status={"endpoints": {}}), model()])
    assert lines[0] == "Base URL http://127.0.0.1:8000/v1"
    assert lines[2] == '    -d \'{"model":"quickstart","messages":[{"role":"user","content":"hi"}]}\''
    assert "Bearer" not in lines[1]
    view = model()
    keyed = render.endpoint_lines([model(status={"endpoints": {**view["status"]["endpoints"], "keys": True}})])
    assert keyed[0].startswith(f"{lines[0]} (with a key")
    assert keyed[1] == lines[1].replace("curl -s", 'curl -s -H "authorization: Bearer $KEY"')


class TestJudge:
    """When a wait ends, and how."""

    def test_served_and_rolled_out_is_done(self) -> None:
        assert judge(model(), 1)[0] is Verdict.DONE

    def test_ready_on_the_old_revision_is_not_done(self) -> None:
        view = model(status={"conditions": [condition("Ready", "True"), condition("RolledOut", "False")]})
        assert judge(view, 1)[0] is Verdict.WAITING

    def test_a_gateway_is_done_when_its_router_has_all_of_it(self) -> None:
        ready = condition("Ready", "True")
        for more, verdict in (
            ([condition("RolledOut", "True")], Verdict.DONE),
            ([condition("RolledOut", "False", "HotUpdatePending")], Verdict.WAITING),
            ([], Verdict.DONE),  # of a control plane of an earlier version, which does not say
        ):
            view = model(kind="gateway", name="default", status={"conditions": [ready, *more]})
            assert judge(view, 1)[0] is verdict

    def test_status_of_an_older_generation_is_not_done(self) -> None:
        assert judge(model(generation=2), 2)[0] is Verdict.WAITING

    def test_a_stall_of_an_older_generation_is_not_this_ones(self) -> None:
        view = model(generation=2, status={"conditions": [condition("Stalled", "True", "CrashLoop")]})
        assert judge(view, 2)[0] is Verdict.WAITING

    def test_a_stall_ends_the_wait_at_once(self) -> None:
        view = model(status={"conditions": [condition("Stalled", "True", "CrashLoop", "out of memory")]})
        assert judge(view, 1) == (Verdict.STALLED, "CrashLoop (out of memory)")

    def test_a_newer_apply_and_a_deletion_end_the_wait(self) -> None:
        assert judge(model(generation=3), 2)[0] is Verdict.SUPERSEDED
        assert judge(model(deleting=True), 1)[0] is Verdict.GONE
        assert judge(None, 1)[0] is Verdict.GONE

    @pytest.mark.parametrize(
        ("kind", "reason", "verdict"),
        [
            ("RolledOut", "RolledBack", Verdict.FAILED),
            ("RolledOut", "Pinned", Verdict.SUPERSEDED),
            ("RolledOut", "RolloutPaused", Verdict.SUPERSEDED),
            ("Ready", "Paused", Verdict.SUPERSEDED),
        ],
    )
    def test_what_was_decided_otherwise_ends_the_wait(self, kind: str, reason: str, verdict: Verdict) -> None:
        view = model(status={"conditions": [condition(kind, "False", reason, "by ada")]})
        assert judge(view, 1) == (verdict, f"{reason} (by ada)")
        assert judge({**view, "generation": 2}, 2)[0] is Verdict.WAITING, "that was another generation"

    def test_a_decision_is_carried_out_when_all_its_replicas_are_there(self) -> None:
        going = {"rollout": {"settled": True}, "replicas": {"desired": 1}}
        undone = [condition("Ready", "True"), condition("RolledOut", "False", "RolledBack", "r1 serves")]
        view = model(status={**going, "conditions": undone})
        assert settled(view)[0] is Verdict.DONE
        assert succeeded(view) == (Verdict.FAILED, "RolledBack (r1 serves)")
        assert settled(model(status={**going, "rollout": {"settled": False}}))[0] is Verdict.WAITING
        unready = [condition("Ready", "False", "Starting")]
        assert settled(model(status={**going, "conditions": unready}))[0] is Verdict.WAITING
        assert (
            settled(model(status={**going, "replicas": {"desired": 0}, "conditions": unready}))[0] is Verdict.DONE
        )
        stuck = [condition("Stalled", "True", "CrashLoop", "again")]
        assert settled(model(status={**going, "conditions": stuck})) == (Verdict.STALLED, "CrashLoop (again)")
        assert succeeded(None)[0] is Verdict.GONE
        for reason in ("Pinned", "RolloutPaused"):
            kept = [condition("Ready", "True"), condition("RolledOut", "False", reason, "by ada")]
            view = model(status={**going, "conditions": kept})
            assert succeeded(view)[0] is Verdict.DONE
            assert rolled_out(view) == (Verdict.SUPERSEDED, f"{reason} (by ada)")
        assert rolled_out(None)[0] is Verdict.GONE

    def test_a_model_declared_with_no_replica_is_done_without_being_ready(self) -> None:
        view = model(
            status={
                "replicas": {"desired": 0, "live": 0, "ready": 0, "updated": 0, "draining": 0},
                "conditions": [condition("Ready", "False"), condition("RolledOut", "True")],
            }
        )
        assert judge(view, 1)[0] is Verdict.DONE


def test_a_terminal_redraws_what_changed_and_a_pipe_appends() -> None:
    written: list[str] = []
    starting = [model(name=name, status={"summary": "Starting", "conditions": []}) for name in ("a", "b")]
    served = [model(name=name) for name in ("a", "b")]
    terminal = Display(written.append, redraw=True, width=40)
    terminal.show(starting)
    terminal.show(starting)
    assert len(written) == 2, "the same is not drawn twice"
    terminal.finish(served)
    text = "".join(written)
    assert text.count("\x1b[2A") == 2, "each drawing starts where the last one did"
    assert text.endswith("✔ loaded 1.2s  ✔ ready 3.4s\n"), "the last one is whole, however narrow the terminal"
    assert "b  ✔ accepted" in written[-1]
    written.clear()
    pipe = Display(written.append, redraw=False, width=40)
    pipe.show(served)
    shown = list(written)
    pipe.finish(served)
    assert written == shown, "nothing is said twice"
    assert not any("\x1b" in line for line in written)


@pytest.mark.parametrize("kind", ["model", "gateway"])
def test_what_an_earlier_generation_came_to_is_no_progress_of_this_one(kind: str) -> None:
    written: list[str] = []
    before = model(kind=kind, generation=2, status={"observedGeneration": 1, "summary": "Stalled: CrashLoop"})
    Display(written.append, redraw=False, width=99).show([before])
    assert written == []
    terminal = Display(written.append, redraw=True, width=99)
    terminal.show([before])
    terminal.finish([before])
    assert not any("Stalled" in line or "✔" in line for line in written)
    assert "…" in written[0]
    written.clear()
    now = model(kind=kind, generation=2, status={"observedGeneration": 2, "summary": "Stalled: CrashLoop"})
    Display(written.append, redraw=False, width=99).show([now])
    assert any("Stalled: CrashLoop" in line for line in written)


def gitsource(summary: str = "Synced a1b2c3d", **status: Any) -> dict[str, Any]:
    found = {
        "summary": summary, "ref": "branch main", "looked": 5.0, "lastAppliedRevision": "a1b2c3d4e5f6a7b8",
        "lastAttemptedRevision": "a1b2c3d4e5f6a7b8", "objects": [{}, {}],
        "conditions": [condition("Ready", "True", "Synced"), condition("Fetched", "True", "Verified")],
    }  # fmt: skip
    return model(kind="gitsource", name="prod", resolved={"suspend": False}, status={**found, **status})


AWAY = condition("Fetched", "False", "RemoteUnreachable", "the connection was refused")


def test_who_waits_for_a_source_reads_for_what() -> None:
    away = gitsource(conditions=[condition("Ready", "True", "Synced"), AWAY])
    for commit, view, wanted in (
        (None, gitsource(), (Verdict.DONE, "")),
        (None, away, (Verdict.WAITING, "RemoteUnreachable (the connection was refused)")),
        ("bbbbbbb", away, (Verdict.WAITING, "a1b2c3d is applied; RemoteUnreachable (the connection was refused)")),
        ("bbbbbbb", gitsource(), (Verdict.WAITING, "a1b2c3d is applied")),
        ("a1b2c3d", away, (Verdict.DONE, "")),
        (None, gitsource(looked=0.5), (Verdict.WAITING, "the repository is being asked")),
    ):
        assert judge_commit(commit, 1.0, False, view) == wanted


@pytest.mark.parametrize("redraw", [True, False])
def test_what_a_wait_is_for_is_shown_while_it_lasts(redraw: bool) -> None:
    away = gitsource("Synced a1b2c3d; RemoteUnreachable", conditions=[condition("Ready", "True", "Synced"), AWAY])
    written: list[str] = []
    now = iter(range(100))
    results = wait(
        Answers(away), {"gitsource/prod": partial(judge_commit, None, 1.0, False)}, timeout=5,
        display=Display(written.append, redraw=redraw, width=100), clock=lambda: next(now), sleep=lambda _: None,
    )  # fmt: skip
    assert results["gitsource/prod"][0] is Verdict.WAITING
    shown = [line for line in written if "RemoteUnreachable (the connection was refused)" in line]
    assert len(shown) == 1, "it is said once"
    assert "Synced a1b2c3d; RemoteUnreachable" in written[-1]


class Answers(Client):
    """A control plane that has one answer."""

    def __init__(self, view: dict[str, Any]) -> None:
        self.view = view

    def get(self, path: str, **query: str | float | None) -> Any:
        return self.view


def test_a_list_of_sources_shows_what_is_not_as_wished() -> None:
    away = gitsource("Synced a1b2c3d; RemoteUnreachable, PruneBlocked")
    assert render.sources([away], NOW)[1].split()[:3] == ["prod", "True", "branch"]
    assert "Synced a1b2c3d; RemoteUnreachable, PruneBlocked" in render.sources([away], NOW)[1]


def test_a_started_control_plane_inherits_no_secret_but_the_hubs_and_no_python_setting() -> None:
    shell = {
        "PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "QUIRE_STATE_DIR": "/s", "HF_HOME": "/hf",
        "CC": "/cc", "CXX": "/c++", "HF_TOKEN": "hf",
        "AWS_SECRET_ACCESS_KEY": "secret", "PYTHONPATH": "/evil", "LD_PRELOAD": "/evil.so",
        "OTEL_EXPORTER_OTLP_HEADERS": "secret", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "secret",
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": "/key", "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE": "/pem",
        "OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318",
    }  # fmt: skip
    passed_on = {"PATH", "HOME", "LC_ALL", "QUIRE_STATE_DIR", "HF_HOME", "HF_TOKEN", "CC", "CXX"}
    passed_on |= {"OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT"}
    assert set(clean_environment(shell)) == passed_on


def test_plan_counts_what_is_refused_and_shows_warnings() -> None:
    gateway = {"key": "gateway/default", "action": "update", "revision": [None, None]}
    warned = plan_item("m", "create", warnings=["0 of 1 replica fits now: model/big holds 8 GiB"])
    taken = {"path": "spec.port", "message": "127.0.0.1:1 is in use by another program", "hint": "choose another"}
    report = {
        "items": [gateway, warned, {**gateway, "action": "refused", "problem": taken}],
        "room": NO_ROOM,
        "summary": {"create": 1, "update": 1, "delete": 0, "refused": 1},
    }
    assert render.plan(report) == [
        "gateway/default  update",
        "model/m  create (revision 1)",
        "  Warning  ⚠ 0 of 1 replica fits now: model/big holds 8 GiB",
        "gateway/default  refused",
        "  Refused  spec.port: 127.0.0.1:1 is in use by another program",
        "    hint: choose another",
        "Plan: 1 to create, 1 to update, 0 to delete, 1 refused.",
    ]


def test_a_base_url_is_shown_only_while_something_listens() -> None:
    why = "AddressInUse: 127.0.0.1:8000 is in use by another program"
    endpoints = {"openai": "http://127.0.0.1:8000/v1", "modelNames": ["quickstart"], "unavailable": why}
    text = render.describe(model(status={"endpoints": endpoints}), [], NOW)
    assert f"Base URL     none now: {why} (platform describe gateway/default)" in text
    assert not any("http://" in line for line in text)
    assert render.endpoint_lines([model(status={"endpoints": endpoints})]) == []


def test_the_gateway_without_a_manifest_has_a_row_and_no_age() -> None:
    status = {"summary": "Stalled: AddressInUse", "conditions": [condition("Ready", "False", generation=0)]}
    view = {"kind": "gateway", "name": "default", "generation": 0, "createdAt": None, "status": status}
    assert render.gateways([view], NOW) == [
        "NAME     READY  BASE URL  STATUS                 AGE",
        "default  False  -         Stalled: AddressInUse  -",
    ]


def a_route(**status: Any) -> dict[str, Any]:
    spec = {
        "match": {"modelNames": ["chat", "x"], "headers": [{"name": "x-tenant", "exact": "beta"}]},
        "backends": [{"model": "a", "weight": 95}, {"model": "b", "weight": 5}],
    }
    return model(kind="route", name="r", resolved=spec, status=status)


def test_a_route_has_a_row_with_its_names_and_weights() -> None:
    head, row = render.routes([a_route()], NOW)
    assert head.split() == ["NAME", "READY", "MODEL", "NAMES", "BACKENDS", "STATUS", "AGE"]
    assert re.split(r" {2,}", row) == ["r", "True", "chat,x (x-tenant: beta)", "a=95,b=5", "Serving", "4m"]
    view = a_route()
    view["resolved"]["backends"] = [{"model": "t", "weight": 1}, {"model": "t", "adapter": "sql", "weight": 1}]
    assert "  t=1,t:sql=1  " in render.routes([view], NOW)[1]


@pytest.mark.parametrize(
    ("ready", "verdict"),
    [
        (condition("Ready", "True"), Verdict.DONE),
        (condition("Ready", "False", "NoWeight"), Verdict.DONE),
        (condition("Ready", "False", "Stopped"), Verdict.DONE),
        (condition("Ready", "False", "BackendNotReady"), Verdict.WAITING),
    ],
)
def test_a_route_is_done_when_it_serves_or_is_to_serve_nothing(ready: dict[str, Any], verdict: Verdict) -> None:
    rolled_out = condition("RolledOut", "True")
    assert judge(a_route(conditions=[ready, rolled_out]), 1)[0] is verdict
    pending = condition("RolledOut", "False", "HotUpdatePending")
    assert judge(a_route(conditions=[ready, pending]), 1)[0] is Verdict.WAITING


def test_events_that_come_one_by_one_stand_in_columns() -> None:
    event = {
        "lastSeen": NOW - 5,
        "type": "Normal",
        "reason": "Created",
        "object": "model/m",
        "message": "generation 1",
    }
    lines = [
        render.event_line({**event, "count": 1}, NOW),
        render.event_line({**event, "count": 3, "type": "Warning", "reason": "ProcessEnded"}, NOW),
    ]
    assert lines[0].index("model/m") == lines[1].index("model/m")
    assert {line.index("generation 1") for line in lines} == {lines[0].index("generation 1")}
    assert "x3" in lines[1]


def test_a_rollout_shows_the_gates_of_its_canary() -> None:
    gates = [
        {"name": "errors", "stable": 0.001, "new": 0.0, "limit": 0.01, "relative": False, "beyond": False},
        {"name": "first token p95", "stable": 0.31, "new": 0.41, "limit": 0.2, "relative": True, "beyond": True},
        {
            "name": "between tokens p95",
            "stable": 0.02,
            "new": None,
            "limit": 0.2,
            "relative": True,
            "beyond": False,
        },
    ]
    canary = {"revision": 2, "step": 1, "steps": [], "requests": 41, "minRequests": 200, "gates": gates}
    view = model(status={"summary": "Serving", "rollout": {"revision": 1, "canary": canary}, "conditions": []})
    assert render.rollout(view)[-4:] == [
        "  GATE                STABLE  CANARY  LIMIT  STATE",
        "  errors              0.1%    0.0%    1.0%   within",
        "  first token p95     310 ms  410 ms  +20%   beyond",
        "  between tokens p95  20 ms   -       +20%   within",
    ]
    canary["gates"] = []
    assert not any("GATE" in line for line in render.rollout(view)), "nothing was counted yet"
    canary["exam"] = {"state": "Waits", "text": "asked 3 of 9 questions", "against": 1, "asked": 3, "questions": 9}
    assert render.rollout(view)[-1] == "  exam against revision 1: asked 3 of 9 questions"
    told = {"type": "RolledOut", "status": "False", "reason": "CanaryProgressing"}
    view["status"]["conditions"] = [{**told, "message": "beside revision 1: asked 3 of 9 questions"}]
    shown = render.rollout(view)
    assert sum("asked 3 of 9 questions" in line for line in shown) == 1, "not twice"
