"""The console in a real browser: headless Chromium, by keyboard, in light and dark, down to 360 pixels, against a
whole platform with the built-in model. Runs where a Chromium and its driver are installed.

Every view that a test comes by is looked at in light and dark by axe, which knows what WCAG 2.2 asks for on its
levels A and AA as far as a program can tell; it is a package for Node, of the lockfile in `axe`. With
`QUIRE_SCREENSHOTS` set to a folder, pictures of these views are left there to be looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from tests.clients.node import installed
from tests.e2e.test_cli import ask
from tests.integration.git_remote import Remote
from tests.integration.test_gitops import route, source
from tests.waiting import eventually

from quire.client import Client

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
AXE = Path(__file__).with_name("axe") / "node_modules" / "axe-core" / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
VIEWS = {
    "models": "#/",
    "model": "#/models/small",
    "events": "#/events",
    "gateway": "#/gateway",
    "chat": "#/playground",
}
ALIAS = """\
apiVersion: quire.dev/v1alpha1
kind: Route
metadata: {name: alias}
spec: {match: {modelNames: [alias]}, backends: [{model: small}]}
"""
MARKUP = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
SHIFTS = """\
window.shifts = [];
new PerformanceObserver((list) => {
  for (const shift of list.getEntries()) if (!shift.hadRecentInput)
    window.shifts.push([shift.value, ...shift.sources.map((source) => source.node?.outerHTML?.slice(0, 80))]);
}).observe({ type: "layout-shift", buffered: false });
"""


FOCUS = "[...document.querySelectorAll('main a')].find((link) => link.textContent === arguments[0]).focus()"
WIDER = """\
if (document.documentElement.scrollWidth <= innerWidth) return [];
const all = [...document.querySelectorAll("main *")];
const out = all.filter((each) => each.getBoundingClientRect().right > innerWidth);
return out.map((each) => `${each.tagName}.${each.className}: ${each.textContent.slice(0, 60)}`);
"""


class Browser:
    """One window of Chromium with helpers to look and to type."""

    def __init__(
        self, width: int = 1280, height: int = 860, scheme: str = "light", motion: str = "reduce"
    ) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
        self.width, self.height = width, height
        self.size(height)
        self.scheme, self.motion = scheme, motion
        self.light_or_dark(scheme)

    def light_or_dark(self, scheme: str) -> None:
        features = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", self.motion)]
        media = {"features": [{"name": name, "value": value} for name, value in features]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def size(self, height: int) -> None:
        screen = {"width": self.width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def close(self) -> None:
        self.driver.quit()

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def go(self, address: str) -> None:
        if address.startswith("#"):
            self.script("location.hash = arguments[0]", address)
        else:
            self.driver.get(address)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str = "body") -> str:
        return str(self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def wait(self, wanted: str, selector: str = "body", seconds: float = 20) -> None:
        eventually(lambda: wanted in self.text(selector), f"{wanted!r} in {selector}", seconds, 0.1, self.text)

    def press(self, *keys: str) -> None:
        for key in keys:
            webdriver.ActionChains(self.driver).send_keys(key).perform()

    def focused(self) -> str:
        return str(self.script("return document.activeElement.innerText || document.activeElement.id"))

    def look(self, name: str) -> None:
        """What is shown now keeps nobody out, in light and in dark; and a picture of it."""
        self.script(AXE.read_text())
        for scheme in ("light", "dark"):
            self.light_or_dark(scheme)
            found = self.driver.execute_async_script(
                "axe.run({runOnly: arguments[0]}).then(arguments[1], (error) => arguments[1](String(error)))",
                RULES,
            )
            bad = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
            assert bad == [], (
                name,
                scheme,
                bad,
                [node["failureSummary"] for node in found["violations"][0]["nodes"]],
            )
            assert len(found["passes"]) > 10, "it looked at the page"
        self.light_or_dark(self.scheme)
        self.picture(name)

    def picture(self, name: str) -> None:
        """The whole page, if pictures are wanted."""
        if not (folder := os.environ.get("QUIRE_SCREENSHOTS")):
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.size(int(self.script("return document.documentElement.scrollHeight")))
        time.sleep(0.3)
        self.driver.save_screenshot(f"{folder}/{name}.png")
        self.size(self.height)

    def complaints(self) -> list[str]:
        """What the browser found wrong: of the page's policy, of scripts, of what could not be loaded."""
        logged = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in logged if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module", autouse=True)
def axe() -> None:
    installed(AXE.parents[2])


@pytest.fixture(scope="module")
def served(shared_platform: Platform) -> Platform:
    """A platform that serves `small`, also by another name."""
    alias = shared_platform.write("alias.yaml", ALIAS)
    shared_platform.run("apply", shared_platform.gateway, shared_platform.model("small"), alias)
    return shared_platform


@pytest.fixture
def link(served: Platform) -> str:
    client = Client(served.state, start=False)
    if client.get("/v1/console")["listening"]:
        return served.run("console").stdout.strip()
    return served.run("console", "--port", "0").stdout.strip()


@contextlib.contextmanager
def browser(**how: Any) -> Iterator[Browser]:
    own = Browser(**how)
    try:
        yield own
    finally:
        own.close()


@contextlib.contextmanager
def load(base: str) -> Iterator[None]:
    """One client that asks again and again."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            ask(base, "small", "What is paging?")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_everything_is_shown_and_kept_up_to_date_without_a_shift(served: Platform, link: str) -> None:
    with browser() as page, load(served.base_url("small")):
        page.go(link)
        page.wait("Serving", "main")
        page.wait("Live", "#link-state")
        assert "token" not in page.script("return location.href")
        assert page.driver.title == "Models · Quire"
        eventually(
            lambda: float(page.text(".tile:nth-child(2) dd").replace(",", "").replace("–", "0")) > 0, "speed", 15
        )
        page.script(SHIFTS)
        time.sleep(7)
        for view in ("#/models/small", "#/events"):
            page.go(view)
            time.sleep(0.5)
            page.script("window.shifts.length = 0")
            time.sleep(5)
            assert sum(shift[0] for shift in page.script("return window.shifts")) < 0.01, (
                view,
                page.script("return window.shifts"),
            )
        page.go("#/models/small")
        for word in (
            "Rollout",
            "Replicas",
            "small-r1-0",
            "Conditions",
            "RolledOut",
            "Revisions",
            "Memory",
            "builtin://tiny",
        ):
            page.wait(word, "main")
        assert page.text("h1") == "small"
        paths = [
            line.get_attribute("d") or "" for line in page.driver.find_elements(By.CSS_SELECTOR, ".plot .line-0")
        ]
        assert len(paths) == 4
        assert all(path.count("L") >= 2 for path in paths), paths
        written = page.script("return document.querySelector('.pane').getAttribute('aria-valuetext')")
        assert written.startswith("now: written ")
        page.script("document.querySelector('.chart details').open = true")
        eventually(lambda: page.find(".chart tbody tr td.num").text not in ("", "–"), "the table has figures")
        page.go("#/gateway")
        page.wait(served.base_url("small"), "main")
        page.wait("route/alias", "main")
        page.wait("head 10s, body 30s", "main")
        page.go("#/models/none")
        page.wait("There is no such model", "main")
        page.go("#/what")
        page.wait("Models that serve", "main")
        assert page.complaints() == []


def test_all_of_it_works_by_keyboard(served: Platform, link: str) -> None:
    with browser() as page:
        page.go(link)
        page.wait("small", "main")
        seen = []
        for _ in range(9):
            page.press(Keys.TAB)
            seen.append(page.focused())
            style = page.script(
                "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
            )
            assert style == "solid2px", (seen, style)
        assert seen[:8] == [
            "Skip to the content",
            "Quire",
            "Models",
            "Events",
            "Gateway",
            "Playground",
            "Theme: system",
            "small",
        ]
        page.press(Keys.SHIFT + Keys.TAB)
        while page.focused() != "small":
            page.press(Keys.TAB)
        page.press(Keys.ENTER)
        page.wait("Rollout", "main")
        assert page.focused() == "small", "the heading of what was opened"
        assert page.script("return document.activeElement.tagName") == "H1"
        assert page.script("return document.querySelector('nav [aria-current]').textContent") == "Models"
        page.find(".pane").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
        assert page.text(".when") == "20 s ago"
        page.press(Keys.END)
        assert page.text(".when") == "now"
        bad = page.script(
            """
            const named = (node) =>
              node.labels?.length || node.getAttribute("aria-label") || node.textContent.trim();
            return [...document.querySelectorAll("a, button, input, select, textarea, [role=slider], meter")]
              .filter((node) => !named(node)).map((node) => node.outerHTML);
            """
        )
        assert bad == []


def test_the_playground_streams_stops_and_says_what_is_wrong(served: Platform, link: str) -> None:
    base = served.base_url("small")
    with browser() as page:
        page.go(link)
        page.wait("small", "main")
        page.go("#/playground")
        page.find("#play-temperature").clear()
        page.find("#play-temperature").send_keys("0")
        page.find("#play-most").clear()
        page.find("#play-most").send_keys("24")
        page.find("#play-draft").send_keys("What is PagedAttention?", Keys.ENTER)
        page.wait("ended by", ".talk")
        told = ask(base, "small", "What is PagedAttention?")["choices"][0]["message"]["content"]
        assert page.text(".assistant > .said") == told
        assert "tokens/s" in page.text(".assistant .note")
        assert page.find("#play-draft").get_attribute("value") == ""

        page.find("#play-more").send_keys('{"ignore_eos": true')
        page.find("#play-draft").send_keys("again", Keys.ENTER)
        page.wait("More fields:", ".stage [role=alert]")
        assert page.find("#play-draft").get_attribute("value") == "again", "nothing that was typed is lost"
        page.find("#play-more").send_keys("}")
        page.find("#play-most").clear()
        page.find("#play-most").send_keys("900")
        page.find("#play-draft").send_keys(Keys.ENTER)
        eventually(lambda: len(page.text(".talk li:last-child > .said")) > 20, "it writes", 20, 0.02)
        page.press(Keys.ESCAPE)
        page.wait("stopped", ".talk li:last-child", 5)
        assert not page.find(".stage form button[type=button]").is_displayed()
        page.find("#play-temperature").clear()
        page.find("#play-temperature").send_keys("9")
        page.find("#play-draft").send_keys("once more", Keys.ENTER)
        page.wait("temperature", ".stage [role=alert]")
        assert page.find("#play-draft").get_attribute("value") == "once more"
        page.look("light-refused")
        assert all("400" in complaint for complaint in page.complaints())


def test_what_comes_from_outside_is_text(served: Platform, link: str) -> None:
    served.run("rollout", "pause", "model/small", "--reason", MARKUP)
    with contextlib.closing(sqlite3.connect(served.state.store, timeout=30)) as store, store:
        taken = {name: MARKUP.replace("taken", f"taken by {name}") for name in ("message", "reason", "object")}
        store.execute(
            "UPDATE events SET message = :message, reason = :reason WHERE reason = 'ReplicaReady'", taken
        )
        store.execute("UPDATE events SET object = 'model/' || :object WHERE reason = 'Listening'", taken)
    with browser() as page:
        page.go(link)
        page.wait("small", "main")
        for view in ("#/", "#/models/small", "#/events"):
            page.go(view)
            page.wait("taken by message", "main")
            page.wait("taken by object" if view != "#/models/small" else "hold by", "main")
            assert page.script("return document.querySelectorAll('main img, main script').length") == 0
            assert "taken" not in page.driver.title
        page.go("#/playground")
        page.find("#play-draft").send_keys(MARKUP, Keys.ENTER)
        page.wait("onerror", ".user > .said")
        assert page.script("return document.querySelectorAll('main img, main script').length") == 0
        blocked = page.script(
            "try { document.body.innerHTML = '<p>'; return 'made'; } catch (error) { return error.name; }"
        )
        assert blocked == "TypeError", "the policy lets no text become markup"
    served.run("rollout", "resume", "model/small")


PARROT = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {name: parrot}
spec:
  source: builtin://tiny
  engine: {runner: scripted, maxModelLen: 1024, kvCache: {size: 16Mi}}
  resources: {cpu: 1}
  parsers: {tools: hermes, reasoning: think}
"""
SCRIPT = (
    "<think>They want the weather.</think>I will look.\n"
    '<tool_call>\n{"name": "look", "arguments": {"at": "Rome"}}\n</tool_call>'
)
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}


def test_thoughts_and_tool_calls_are_shown_as_text(served: Platform, link: str) -> None:
    served.run("apply", served.write("parrot.yaml", PARROT))
    with browser() as page:
        page.go(link)
        page.wait("parrot", "main")
        page.go("#/playground/parrot")
        page.find("#play-more").send_keys(json.dumps({"script": SCRIPT, "tools": [TOOL]}))
        page.find("#play-draft").send_keys("How is the weather?", Keys.ENTER)
        page.wait("ended by tool_calls", ".talk")
        assert page.text(".assistant > .said").strip() == "I will look."
        assert page.text(".assistant .calls") == 'look({"at": "Rome"})'
        page.find(".assistant .thought summary").click()
        assert page.text(".assistant .thought .said").strip() == "They want the weather."
        page.look("light-thoughts")
        assert page.complaints() == []
    served.run("delete", "model/parrot")


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("light", 1280, "light"), ("dark", 1280, "dark"), ("narrow", 360, "light")]
)
def test_each_view_in_light_and_dark_and_where_it_is_narrow(
    served: Platform, link: str, name: str, width: int, scheme: str
) -> None:
    with browser(width=width, scheme=scheme) as page:
        page.go(link)
        page.wait("Serving", "main")
        for view, address in VIEWS.items():
            page.go(address)
            time.sleep(0.5)
            assert page.script("return document.documentElement.scrollWidth <= innerWidth"), view
            if view == "chat":
                page.find("#play-draft").send_keys("What is paging?", Keys.ENTER)
                page.wait("ended by", ".talk")
            page.look(f"{name}-{view}")
        paper = page.script("return getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(18, 20, 22)" if scheme == "dark" else "rgb(246, 245, 241)")
        theme = page.find("#theme")
        theme.click()
        theme.click()
        assert theme.text == "Theme: dark"
        page.driver.refresh()
        page.wait("Live", "#link-state")
        assert page.script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 22)"
        assert page.complaints() == []


def test_a_git_source_shows_its_commits_and_why_one_is_refused(
    served: Platform, link: str, tmp_path: Path
) -> None:
    remote = Remote(tmp_path / "remote")
    try:
        remote.write(deep__r=route("r"))
        first = remote.push(f"first {MARKUP}")
        served.run("apply", served.write("source.yaml", source(remote)))
        remote.write(deep__r="apiVersion: quire.dev/v1alpha1\nkind: Rout\n")
        remote.push("a typo")
        served.run("source", "sync", "prod", code=6)
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
            with browser(width=width, scheme=scheme) as page:
                page.go(link)
                page.wait("Serving", "main")
                page.go("#/gateway")
                page.wait("gitsource/prod", "main")
                page.script(FOCUS, "gitsource/prod")
                page.driver.switch_to.active_element.send_keys(Keys.ENTER)
                page.wait("Commits", "main")
                assert page.text("h1") == "prod"
                for word in (
                    first, "deep/r.yaml:2:7", "'Rout' is not a kind of resource", "did you mean 'Route'?",
                    "Refused", "a typo", MARKUP, "route/r created", "branch main", "its objects stay", "Drifted",
                ):  # fmt: skip
                    page.wait(word, "main")
                assert page.script(WIDER) == [], f"{scheme} {width}"
                page.look(f"source-{scheme}-{width}")
                assert page.script("return document.title") == "prod · Quire"
                page.go("#/sources/none")
                page.wait("There is no such source", "main")
                assert page.complaints() == []
        (remote.work / "deep/r.yaml").write_text(route("r", "mended"))
        with browser() as page:
            page.go(link)
            page.wait("Serving", "main")
            page.go("#/sources/prod")
            page.wait("Why the newest commit", "main")
            mended = remote.push("mended")
            page.wait(mended, "main")
            eventually(lambda: "Why the newest commit" not in page.text("main"), "the problem is gone")
    finally:
        served.run("delete", "gitsource/prod")
        served.run("delete", "route/r")
        remote.close()


def test_it_tells_of_a_control_plane_that_is_gone_and_goes_on_with_the_next_ones_link(
    served: Platform, link: str
) -> None:
    port = link.partition("/#")[0].rpartition(":")[2]
    with browser() as page:
        page.go(link)
        page.wait("Live", "#link-state")
        os.kill(Client(served.state, start=False).get("/v1/ping")["pid"], signal.SIGKILL)
        page.wait("Disconnected", "#link-state")
        page.wait("platform console in a terminal gives a new link", "#notice")
        page.wait("small", "main")  # what was known stays
        page.look("light-disconnected")
        again = served.run("console", "--port", port).stdout.strip()
        page.wait("No access", "#link-state")
        page.wait("platform console", "#notice")
        first = page.driver.current_window_handle
        page.driver.switch_to.new_window("tab")
        page.go(again)
        page.wait("Live", "#link-state")
        page.driver.switch_to.window(first)
        page.wait("Live", "#link-state", 15)
        assert not page.find("#notice").is_displayed()
        served.run("console", "--stop")
        page.wait("Disconnected", "#link-state")


def test_who_has_no_link_and_who_has_no_model(platform: Platform) -> None:
    platform.run("apply", platform.gateway)
    link = platform.run("console", "--port", "0").stdout.strip()
    with browser() as page:
        page.go(link.partition("#")[0])
        page.wait("No access", "main")
        page.wait("platform console", "main")
        page.look("light-locked")
        page.go(link)
        page.wait("Nothing is served yet", "main")
        page.look("light-empty")
        page.go("#/playground")
        page.find("#play-draft").send_keys("hi", Keys.ENTER)
        page.wait("There is no model to ask", ".stage [role=alert]")
        platform.run("apply", "--no-wait", platform.write("bad.yaml", BAD))
        page.go("#/models/bad")
        page.wait("bad", "h1")
        page.wait("What you can do", "main")
        page.wait("Stalled", ".title", 90)
        page.look("light-stalled")


BAD = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {name: bad}
spec:
  source: builtin://tiny
  engine: {maxModelLen: 512, kvCache: {size: 16Mi}}
  resources: {cpu: 1}
  restartPolicy: {maxRestartsBeforeRollback: 1, backoffBase: 100ms}
  env: [{name: PYTHONHOME, value: /none}]
"""
