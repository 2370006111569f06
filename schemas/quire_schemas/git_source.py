"""Kind `GitSource`: a folder of a git repository whose manifests are applied as they change."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from quire_schemas.quantities import Duration, Percent
from quire_schemas.resource import HONOURED, Resource, Strict, Text, declared, section


class GitRef(Strict):
    """What is followed: at most one; without any the branch that the repository itself names."""

    branch: Text | None = declared("Head of a branch.", None, update="hot")
    tag: Text | None = declared("A tag.", None, update="hot")
    semver: Text | None = declared(
        "Newest tag in a range of versions, such as '>=1.2 <2'.",
        None,
        update="hot",
        refused="ranges of versions are not followed yet; name a tag or a branch",
    )
    commit: Text | None = declared("A commit, by all 40 digits of it.", None, update="hot")


class GitAuth(Strict):
    """Credential for the repository."""

    secret_ref: str = declared(
        "Name of a secret stored with the platform: a token, or user:token.", update="hot", max_length=253
    )


class Webhook(Strict):
    """A notification that makes the platform fetch at once; its payload is never trusted."""

    provider: Literal["github", "gitlab", "gitea", "generic"] = declared(
        "Who sends it, and so how it is signed: X-Hub-Signature-256 (github, generic), X-Gitea-Signature, or "
        "X-Gitlab-Token.",
        update="hot",
    )
    port: int = declared(
        "Port on loopback that POST /hooks/NAME is taken on, NAME being that of the source; a proxy in front "
        "of it "
        "speaks TLS. Sources may share one.",
        8430,
        update="hot",
        ge=1,
        le=65535,
    )
    secret_ref: str = declared("Name of the secret that signs it.", update="hot", max_length=253)


class Window(Strict):
    """A time in which commits are applied or not. Deny wins over Allow; where there is an Allow, all else is
    denied."""

    kind: Literal["Allow", "Deny"] = declared("Whether commits are applied in it.", update="hot")
    schedule: str = declared("When it opens, as five cron fields.", update="hot", min_length=1, max_length=128)
    duration: Duration = declared("How long it stays open, at most 7d.", update="hot")
    time_zone: str = declared("Zone of the schedule.", "UTC", update="hot", max_length=64)


class Sync(Strict):
    """How commits are applied."""

    prune: bool = declared("Delete objects that left the repository.", False, update="hot")
    self_heal: bool = declared("Undo changes made by hand.", False, update="hot")
    allow_empty: bool = declared("Apply a commit without any manifest.", False, update="hot")
    max_prune: Percent = declared(
        "Where a commit would delete more than this share of the source's objects, none is deleted; the rest "
        "of it "
        "is applied.",
        "50%",
        update="hot",
    )
    retry_interval: Duration = declared("Wait after a failed attempt.", "30s", update="hot")
    windows: Annotated[tuple[Window, ...], Field(strict=False, max_length=64)] = declared(
        "Times in which commits are applied or not.", (), update="hot"
    )


class Verify(Strict):
    """Which commits are trusted."""

    signed_by: Annotated[tuple[str, ...], Field(strict=False, max_length=64)] = declared(
        "Public keys of ssh, as in 'ssh-ed25519 AAAA…'; when there are any, only a commit signed by one of "
        "them is "
        "applied.",
        (),
        update="hot",
    )


class GitSourceSpec(Strict):
    """What is followed, and how it is applied."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=2048)] = declared(
        "URL of the repository: https, or http to this machine itself.", update="hot"
    )
    ref: GitRef = section(GitRef, "What is followed.")
    path: str = declared("Folder inside the repository.", ".", update="hot", min_length=1, max_length=1024)
    auth: GitAuth | None = section(GitAuth, "Credential for the repository.", optional=True)
    interval: Duration = declared("Time between two fetches, at least 1s.", "1m", update="hot")
    webhook: Webhook | None = section(Webhook, "A notification that makes the platform fetch.", optional=True)
    sync: Sync = section(Sync, "How commits are applied.")
    verify: Verify = section(Verify, "Which commits are trusted.")
    suspend: bool = declared("Apply nothing for now.", False, update="hot")
    deletion_policy: Literal["Orphan", "Delete"] = declared(
        "What becomes of the source's objects when it is deleted: they stay as they are and are nobody's, or they "
        "are deleted with it.",
        "Orphan",
        update="hot",
    )


class GitSource(Resource):
    """A folder of manifests in git."""

    kind: Literal["GitSource"] = declared("Which kind of object this is.", update="immutable")
    spec: GitSourceSpec = Field(
        ...,
        description="What is followed, and how it is applied.",
        json_schema_extra={"x-quire-update": "hot", "x-quire-support": HONOURED},
    )
