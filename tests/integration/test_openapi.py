"""The API's description against the router that serves it."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from tests.integration.router_world import World

from quire.router.openapi import ENDPOINTS, as_json

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "docs" / "reference" / "openapi.json"


async def test_the_router_has_the_described_paths_and_no_others(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        listed = (await http.get("/no-such-path")).json()["error"]["message"]
        described = {each.path for each in ENDPOINTS}
        assert set(re.findall(r"(/\S*?)[,.]? ", listed.partition("There are: ")[2].rstrip(".") + " ")) == described
        for each in ENDPOINTS:
            answer = await http.options(re.sub(r"{\w+}", "any", each.path))
            allowed = set(answer.headers["allow"].split(", ")) - {"OPTIONS"}
            assert allowed == set(each.methods), each.path


async def test_the_served_description_is_the_published_one(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        answer = await http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == as_json()
    assert answer.json() == httpx.Response(200, content=PUBLISHED.read_bytes()).json()
