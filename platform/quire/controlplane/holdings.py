"""What this machine keeps for models beside their manifests: the hub's cache, and secrets."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from quire.controlplane.errors import ApiError
from quire.controlplane.plane import ControlPlane
from quire_operators import status
from quire_operators.access import KIND as POLICY
from quire_operators.models import needs_of
from quire_operators.placement import Placement
from quire_operators.routes import ROUTES
from quire_operators.secrets import SecretNotFound
from quire_schemas.model import SECRET_NAME


class Holdings:
    """The cache and the secrets of one control plane."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    # ── cache ─────────────────────────────────────────────────────────────────────────────────────────────

    def _cache_users(self) -> tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str], list[str]]]:
        """(repository, commit) -> the models that use it now, and those that only had it in an older revision."""
        now: dict[tuple[str, str], list[str]] = {}
        before: dict[tuple[str, str], list[str]] = {}
        for stored in self._plane.store.objects("model"):
            rows = {row.revision for row in self._plane.store.replicas(stored.key.name)}
            wanted = self._plane.models.effective(stored)
            kept = (wanted.revision, wanted.newest, wanted.stable, wanted.fallback)
            rows |= {revision.n for revision in kept if revision is not None}
            for revision in self._plane.store.revisions(stored.uid):
                used = revision.n in rows
                for need in needs_of(revision.resolved, Placement.from_dict(revision.placement)):
                    users = (now if used else before).setdefault((need.repository, need.commit), [])
                    if str(stored.key) not in users:
                        users.append(str(stored.key))
        return now, before

    async def cache(self) -> dict[str, Any]:
        """What lies in the cache, who uses it, and what `prune` would free."""
        cache = self._plane.downloads.cache
        now, before = self._cache_users()
        entries = await asyncio.to_thread(cache.usage)
        items = []
        for entry in entries:
            key = (entry.repository, entry.commit)
            items.append(
                {
                    "source": f"hf://{entry.repository}",
                    "commit": entry.commit,
                    "refs": list(entry.refs),
                    "bytes": entry.size,
                    "incompleteBytes": entry.incomplete,
                    "prunableBytes": 0 if key in now else entry.ours + entry.incomplete,
                    "downloadedByQuire": entry.ours + entry.incomplete > 0,
                    "usedBy": now.get(key, []),
                    "formerlyUsedBy": [name for name in before.get(key, []) if name not in now.get(key, [])],
                    "lastUsed": None if entry.last_used is None else status.timestamp(entry.last_used),
                }
            )
        return {"folder": str(cache.root), "free": cache.free(), "items": items}

    async def prune(self, *, dry_run: bool) -> dict[str, Any]:
        """Remove what Quire downloaded and no declared model uses."""
        cache = self._plane.downloads.cache
        removed = []
        async with self._plane.cache_turn:
            used, _ = self._cache_users()
            for entry in await asyncio.to_thread(cache.usage):
                if (entry.repository, entry.commit) in used or not entry.ours + entry.incomplete:
                    continue
                freed = await asyncio.to_thread(cache.prune, entry.repository, entry.commit, dry_run=dry_run)
                removed.append({"source": f"hf://{entry.repository}", "commit": entry.commit, "bytes": freed})
        return {"folder": str(cache.root), "dryRun": dry_run, "items": removed}

    # ── secrets ───────────────────────────────────────────────────────────────────────────────────────────

    def list_secrets(self) -> dict[str, Any]:
        """Names, and which objects refer to them; never a value."""
        users = self._users()
        kept = set(self._plane.secrets.names())
        names = sorted({*kept, *users})
        return {"items": [{"name": n, "set": n in kept, "usedBy": users.get(n, [])} for n in names]}

    def _users(self) -> dict[str, list[str]]:
        """The objects that refer to secrets, by the names of those."""
        users: dict[str, list[str]] = {}
        for stored in self._plane.store.objects("model"):
            name = (stored.resolved.get("sourceAuth") or {}).get("secretRef")
            if name is not None:
                users.setdefault(name, []).append(str(stored.key))
        for stored in self._plane.store.objects(POLICY):
            for key in stored.resolved["keys"]:
                name = (key["valueFrom"] or {}).get("secretRef")
                if name is not None and str(stored.key) not in users.setdefault(name, []):
                    users[name].append(str(stored.key))
        return users

    def _look_at_keys(self) -> None:
        self._plane.policies.look_again()
        self._plane.wake(ROUTES)

    def set_secret(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, str) or not value.strip() or "\n" in value.strip():
            hint = "give it whole and without a line's end in it, such as --from-file FILE of one line"
            raise ApiError(400, "bad_request", "a secret is one line of text", hint, exit_code=2)
        if not (value.strip().isascii() and value.strip().isprintable()):
            hint = "a token of bytes is written in base64 or hexadecimal digits"
            raise ApiError(
                400, "bad_request", "a secret is of letters, digits and signs of ASCII", hint, exit_code=2
            )
        try:
            self._plane.secrets.put(name, value.strip())
        except OSError as error:
            raise ApiError(
                507,
                "store_unavailable",
                f"the secret cannot be kept: {error.strerror}",
                "platform doctor",
                exit_code=7,
            ) from error
        except SecretNotFound as error:
            raise ApiError(400, "bad_request", error.message, error.hint, exit_code=2) from error
        self._plane.downloads.look_again()
        self._look_at_keys()
        return {"name": name}

    def remove_secret(self, name: str) -> dict[str, Any]:
        if not re.fullmatch(SECRET_NAME, name) or not self._plane.secrets.remove(name):
            raise ApiError(404, "not_found", f"there is no secret {name}", "platform secret list", exit_code=8)
        self._look_at_keys()
        return {"name": name, "usedBy": self._users().get(name, [])}
