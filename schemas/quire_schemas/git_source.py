"""Kind `GitSource`: a folder of a git repository whose manifests are applied as they change.

The schema is complete, so that documents can be written and checked against it; applying one is refused by
this version (`KIND_REFUSED`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from quire_schemas.quantities import Duration, Percent
from quire_schemas.resource import Resource, Strict, Text, declared, section

KIND_REFUSED = "git repositories are not followed yet; apply a checkout with: platform apply FOLDER"


class GitRef(Strict):
    """What is followed; exactly one."""

    branch: Text | None = declared("Head of a branch.", None, update="hot")
    tag: Text | None = declared("A tag.", None, update="hot")
    semver: Text | None = declared("Newest tag in a range of versions, such as '>=1.2 <2'.", None, update="hot")
    commit: Text | None = declared("A commit.", None, update="hot")


class GitAuth(Strict):
    """Credential for the repository."""

    secret_ref: str = declared("Name of a secret stored with the platform.", update="hot")


class Webhook(Strict):
    """A notification that makes the platform fetch at once; its payload is never trusted."""

    provider: Literal["github", "gitlab", "gitea", "generic"] = declared("Who sends it.", update="hot")
    secret_ref: str = declared("Name of the secret that signs it.", update="hot")


class Window(Strict):
    """A time in which changes are applied or not."""

    kind: Literal["Allow", "Deny"] = declared("Whether changes are applied in it.", update="hot")
    schedule: str = declared("When it opens, as five cron fields.", update="hot", min_length=9, max_length=128)
    duration: Duration = declared("How long it stays open.", update="hot")
    time_zone: str = declared("Zone of the schedule.", "UTC", update="hot", max_length=64)


class Sync(Strict):
    """How commits are applied."""

    prune: bool = declared("Delete objects that left the repository.", False, update="hot")
    self_heal: bool = declared("Undo changes made by hand.", False, update="hot")
    allow_empty: bool = declared("Apply a commit without any manifest.", False, update="hot")
    max_prune: Percent = declared(
        "Refuse a commit that would delete more than this share of the objects.", "50%", update="hot"
    )
    retry_interval: Duration = declared("Wait after a failed attempt.", "30s", update="hot")
    windows: Annotated[tuple[Window, ...], Field(strict=False, max_length=64)] = declared(
        "Times in which changes are applied or not.", (), update="hot"
    )


class Verify(Strict):
    """Which commits are trusted."""

    signed_by: Annotated[tuple[str, ...], Field(strict=False, max_length=64)] = declared(
        "Keys; when there are any, only commits signed by one of them are applied.", (), update="hot"
    )


class GitSourceSpec(Strict):
    """What is followed, and how it is applied."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=2048)] = declared(
        "URL of the repository.", update="hot"
    )
    ref: GitRef = section(GitRef, "What is followed.")
    path: str = declared("Folder inside the repository.", ".", update="hot", max_length=1024)
    auth: GitAuth | None = section(GitAuth, "Credential for the repository.", optional=True)
    interval: Duration = declared("Time between two fetches.", "1m", update="hot")
    webhook: Webhook | None = section(Webhook, "A notification that makes the platform fetch.", optional=True)
    sync: Sync = section(Sync, "How commits are applied.")
    verify: Verify = section(Verify, "Which commits are trusted.")
    suspend: bool = declared("Apply nothing for now.", False, update="hot")


class GitSource(Resource):
    """A folder of manifests in git."""

    kind: Literal["GitSource"] = declared("Which kind of object this is.", update="immutable")
    spec: GitSourceSpec = Field(
        ...,
        description="What is followed, and how it is applied.",
        json_schema_extra={"x-quire-update": "hot", "x-quire-support": KIND_REFUSED},
    )
