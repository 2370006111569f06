"""A git source as people meet it: the real command line, a repository on this machine, no engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.conftest import Platform
from tests.integration.git_remote import Remote
from tests.integration.test_gitops import route, source


@pytest.mark.nightly
def test_a_source_by_the_command_line(platform: Platform, tmp_path: Path) -> None:
    remote = Remote(tmp_path / "remote")
    try:
        remote.write(deep__a=route("a"))
        first = remote.push("first")
        file = platform.write("source.yaml", source(remote, more=", sync: {prune: true}").replace("1s", "1h"))
        platform.run("apply", platform.gateway, "--no-wait")
        assert "gitsource/prod  created" in platform.run("apply", file).stdout
        listed = platform.run("get", "gitsources").stdout.splitlines()
        assert listed[1].split()[:6] == ["prod", "True", "branch", "main", first[:12], "1"]
        told = platform.run("source", "wait", "prod", "--commit", first[:8], "--for", "applied").stdout
        assert told == f"gitsource/prod  {first}\n"

        remote.write(deep__b=route("b"), deep__c="apiVersion: quire.dev/v1alpha1\nkind: Rout\n")
        bad = remote.push("a typo")
        said = platform.run("source", "sync", "prod", code=6).stderr
        assert "ValidationFailed (deep/c.yaml:2:7: kind: 'Rout' is not a kind of resource)" in said
        assert platform.run("source", "wait", "prod", "--commit", bad, code=6).stdout == ""
        said = platform.run("describe", "gitsource/prod").stdout
        assert "deep/c.yaml:2:7: error: kind: 'Rout' is not a kind of resource" in said
        assert "hint: did you mean 'Route'?" in said
        assert "route/b" not in said

        mine = platform.write("a.yaml", route("a", "by-hand"))
        said = platform.run("apply", mine, code=5).stderr
        assert f"route/a is managed by gitsource/prod, from deep/a.yaml at {first[:12]}" in said
        assert "hint: change it there; or --take-ownership" in said
        assert "apply would be refused without --take-ownership" in platform.run("plan", mine).stdout
        platform.run("delete", "route/a", code=5)
        platform.run("apply", mine, "--take-ownership", "--no-wait")
        assert "Managed by   gitsource/prod" in platform.run("describe", "route/a").stdout

        (remote.work / "deep/c.yaml").unlink()
        good = remote.push("mended")
        assert f"gitsource/prod  {good}" in platform.run("source", "sync", "prod").stdout
        view = json.loads(platform.run("get", "route/a", "-o", "json").stdout)
        assert view["resolved"]["match"]["modelNames"] == ["a-name"]
        assert view["managedBy"]["file"] == "deep/a.yaml"

        platform.run("source", "suspend", "prod", "--reason", "incident 12")
        platform.run("source", "sync", "prod", code=5)
        platform.run("source", "wait", "prod", code=5)
        assert "suspended by" in platform.run("describe", "gitsource/prod").stdout
        platform.run("source", "resume", "gitsource/prod")
        remote.write(deep__b=route("b", "b-later"))
        later = remote.push("later")
        told = platform.run("source", "wait", "prod", "--for", "applied").stdout
        assert told == f"gitsource/prod  {later}\n", "it asks now, not in an hour"
        rows = platform.run("source", "history", "prod").stdout.splitlines()
        assert [row.split()[2] for row in rows[1:]] == ["Applied", "Applied", "Refused", "Applied"]
        assert "route/a updated, route/b created" in rows[2]
        answer = json.loads(platform.run("source", "history", "prod", "-o", "json").stdout)
        assert answer["items"][2]["commit"] == bad

        lines = platform.run("delete", "gitsource/prod").stdout.splitlines()
        assert lines[1:3] == [f"route/{name}  stays: spec.deletionPolicy is Orphan" for name in "ba"]
        assert platform.run("get", "routes", "-o", "name").stdout.split() == ["route/a", "route/b"]
        platform.run("apply", mine, "--no-wait")  # nobody's now
        platform.run("source", "sync", "none", code=8)
        platform.run("source", "wait", "none", code=8)

        owns = platform.write("owns.yaml", source(remote, more=", deletionPolicy: Delete").replace("1s", "1h"))
        platform.run("apply", owns)
        remote.answers = False
        said = platform.run("source", "sync", "prod", "--timeout", "3s", code=4).stderr
        assert said.count("gitsource/prod  RemoteUnreachable (") == 1, "while it waits, and once"
        assert "not ready after 3 s: RemoteUnreachable (" in said
        assert "; RemoteUnreachable" in platform.run("get", "gitsources").stdout
        said = platform.run("delete", "gitsource/prod", code=5).stderr
        assert "2 of its 2 objects would be deleted with it" in said
        assert (
            "delete gitsource/prod --prune deletes them, too; with spec.deletionPolicy: Orphan they stay" in said
        )
        assert platform.run("get", "routes", "-o", "name").stdout.split() == ["route/a", "route/b"]
        said = platform.run("delete", "gitsource/prod", "--prune").stdout
        assert "route/a  deleting, with gitsource/prod" in said
        assert platform.run("get", "routes", "-o", "name").stdout.split() == []
        platform.run("source", "wait", "prod", "--commit", "xyz", code=2)
    finally:
        remote.close()
