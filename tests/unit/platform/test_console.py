"""The console's parts without a socket: links, what is made of the router's figures, and the page's own files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import quire.console
from quire.console import files
from quire.console.links import KEPT, Links
from quire.console.load import FIELDS, Load, Router
from quire.series import percentile, read_buckets
from quire_schemas import signals

PAGE = Path(quire.console.__file__).parent / "page"
SCRIPTS = sorted(PAGE.glob("*.js"))


def test_links_are_known_by_their_hashes_and_the_oldest_is_forgotten() -> None:
    links = Links()
    tokens = [links.mint() for _ in range(KEPT)]
    assert len(set(tokens)) == KEPT
    assert not links.newest_used
    assert all(links.knows(token) for token in tokens)
    assert links.newest_used
    assert not links.knows("")
    assert not links.knows(tokens[0].swapcase())
    kept = repr(vars(links))
    assert not any(token in kept for token in tokens)
    links.mint()
    assert not links.newest_used
    assert [links.knows(token) for token in tokens] == [False] + [True] * (KEPT - 1)


def metrics(out: int, waits: tuple[int, int, int], *, up: int = 2) -> str:
    """A page of metrics of the model `m` with two replicas; `waits` are counts up to 0.1 s, 0.5 s and in all."""
    ttft = signals.TIME_TO_FIRST_TOKEN
    bounds = zip(("0.1", "0.5", "+Inf"), waits, strict=True)
    replicas = [f'{{model="m",replica="m-{number}"}}' for number in range(up)]
    return "\n".join(
        [
            "# HELP ignored",
            f'{signals.GENERATION_TOKENS}_total{{model="m"}} {out}',
            *(f'{ttft}_bucket{{model="m",le="{bound}"}} {count}' for bound, count in bounds),
            *(f'{signals.REQUESTS_IN_FLIGHT}{{model="{model}"}} 3.0' for model in ("m", "-")),
            *(f"{signals.REPLICA_UP}{labels} 1.0" for labels in replicas),
            *(f"{signals.KV_CACHE_USAGE}{labels} 0.25" for labels in replicas),
            *(f"{signals.NUM_REQUESTS_RUNNING}{labels} 4.0" for labels in replicas),
        ]
    )


def test_a_point_is_made_of_two_looks() -> None:
    now = 0.0
    load = Load(lambda: Router("", None, None), clock=lambda: now, wall=lambda: 1000 + now)
    load.take(metrics(100, (0, 0, 0)))
    assert load.told()["items"] == []
    now = 2.0
    load.take(metrics(300, (6, 10, 10)))
    now = 4.0
    load.take(metrics(300, (6, 10, 10)))
    first, second = load.told()["items"]
    assert (first["n"], first["at"], list(first["models"])) == (1, 1002.0, ["m"])
    seen = dict(zip(FIELDS, first["models"]["m"], strict=True))
    assert seen["outTokensPerSecond"] == 100
    assert (seen["inFlight"], seen["running"], seen["up"], seen["kv"]) == (3, 8, 2, 0.25)
    assert seen["ttftP50"] == pytest.approx(0.1 * 5 / 6, abs=1e-5)
    assert seen["ttftP95"] == pytest.approx(0.1 + 0.4 * 3.5 / 4, abs=1e-5)
    later = dict(zip(FIELDS, second["models"]["m"], strict=True))
    assert later["outTokensPerSecond"] == 0
    assert later["ttftP50"] == seen["ttftP50"], "half a minute together"
    assert load.told(1)["items"] == [second]
    assert load.told(99)["items"] == [first, second]


def test_what_is_told_of_a_router_that_began_anew_is_not_negative() -> None:
    now = 0.0
    load = Load(lambda: Router("", None, None), clock=lambda: now)
    load.take(metrics(1000, (50, 90, 100)))
    now = 2.0
    load.take(metrics(10, (4, 4, 4)))
    seen = dict(zip(FIELDS, load.told()["items"][0]["models"]["m"], strict=True))
    assert seen["outTokensPerSecond"] == 0
    assert seen["ttftP95"] == pytest.approx(0.095)


def test_percentiles_of_buckets() -> None:
    def at(*counts: float) -> list[tuple[float, float]]:
        return list(zip((1.0, 2.0, float("inf")), counts, strict=True))

    assert percentile(at(0, 0, 0), at(0, 0, 0), 0.5) is None
    assert percentile((), (), 0.5) is None
    assert percentile((), at(10, 10, 10), 0.5) == 0.5
    assert percentile(at(10, 10, 10), at(10, 20, 20), 0.5) == 1.5
    assert percentile((), at(0, 0, 5), 0.5) == 2.0, "above the last bound nothing more is known"
    text = f'{signals.TIME_TO_FIRST_TOKEN}_bucket{{le="+Inf",model="a"}} 3.0\nother_bucket{{le="1",model="a"}} 1.0'
    assert read_buckets(text, signals.TIME_TO_FIRST_TOKEN) == {"a": [(float("inf"), 3.0)]}


def test_every_file_of_the_page_is_in_the_table_and_no_other() -> None:
    assert {name for name, _ in files.FILES.values()} == {path.name for path in PAGE.iterdir()}
    assert all(body for body, _ in files.load().values())
    for script in SCRIPTS:
        for imported in re.findall(r'from "\./([^"]+)"', script.read_text()):
            assert f"/{imported}" in files.FILES, script
    for asked in re.findall(r'(?:src|href)="(/[^"]+)"', (PAGE / "index.html").read_text()):
        assert asked in files.FILES


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_markup_or_code_of_text(script: Path) -> None:
    text = script.read_text()
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
    ):
        assert way not in text
    assert "//" not in re.sub(r"^\s*//.*$|\s//\s.*$", "", text, flags=re.M).replace(
        "http://www.w3.org/2000/svg", ""
    )


def palettes() -> list[dict[str, tuple[float, float, float]]]:
    text = (PAGE / "style.css").read_text()
    found = []
    for block in re.findall(r":root[^{]*\{([^}]*)\}", text):
        colours = re.findall(r"--([a-z-]+): #([0-9a-f]{6})", block)
        found.append({name: _linear(value) for name, value in colours})
    return found


def _linear(value: str) -> tuple[float, float, float]:
    parts = [int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return red, green, blue


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """By WCAG 2: of relative luminances."""
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(sum(w * part for w, part in zip(weights, each, strict=True)) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_words_stand_out_in_every_palette() -> None:
    light, dark, by_system = palettes()
    assert dark == by_system, "what is chosen and what the system prefers are one palette"
    for colours in (light, dark):
        for sheet in ("paper", "sheet", "sunk"):
            for word in ("ink", "soft", "accent", "second", "good", "going", "bad"):
                assert contrast(colours[word], colours[sheet]) >= 4.5, (word, sheet)
            for shape in ("edge", "focus"):
                assert contrast(colours[shape], colours[sheet]) >= 3, (shape, sheet)
        assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
        assert contrast(colours["ink"], colours["bad-sheet"]) >= 4.5
        assert contrast(colours["bad"], colours["sheet"]) >= 4.5
