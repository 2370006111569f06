// Begins: takes the token out of the address, follows the control plane, and shows the view that the address names.

import { el, mark, say, show, tell } from "./dom.js";
import { events } from "./events.js";
import { gateway } from "./gateway.js";
import { follow, lookNow, models, takeToken, world } from "./link.js";
import { model } from "./model.js";
import { overview } from "./overview.js";
import { playground } from "./playground.js";
import { source } from "./source.js";
import { clock } from "./words.js";

const VIEWS = { "": overview, models: model, events, gateway, playground, sources: source };
const NAMES = { "": "overview", models: "overview", sources: "gateway" };
const OF_ONE = ["models", "sources"];
const main = document.getElementById("main");
const notice = document.getElementById("notice");
const stateText = document.getElementById("link-text");
const stateNode = document.getElementById("link-state");
const announce = document.getElementById("announce");
let view = null;
let shownAt = null;
const summaries = new Map();

const STATES = {
  wait: ["Connecting", null],
  live: ["Live", null],
  lost: ["Disconnected", "The control plane does not answer; this page tries again by itself. If it ended, the router and the engines go on, and `platform console` in a terminal gives a new link."],
  locked: ["No access", "This link does not count, or counts no longer: the control plane has forgotten it. Get a new one in a terminal: `platform console`"],
  down: ["Down", "The platform is down. What was applied is kept; in a terminal, `platform up` starts it again."],
};

function place() {
  const [, name = "", argument] = /^#\/([a-z]*)(?:\/(.+))?$/.exec(location.hash) ?? [];
  let given;
  try { given = argument === undefined ? undefined : decodeURIComponent(argument); } catch { given = undefined; }
  return { name: name in VIEWS && (!OF_ONE.includes(name) || given) ? name : "", given };
}

function route(moved) {
  const { name, given } = place();
  const address = `${name}/${given ?? ""}`;
  if (!world.ping || address === shownAt) return;
  view?.node.leave?.();
  view = VIEWS[name](given);
  shownAt = address;
  view.node.update();
  main.replaceChildren(view.node);
  document.title = `${view.title} · Quire`;
  for (const link of document.querySelectorAll("nav a")) mark(link, "aria-current", link.dataset.view === (NAMES[name] ?? name) ? "page" : null);
  if (moved) {
    scrollTo(0, 0);
    view.node.querySelector("h1").focus({ preventScroll: true });
  }
}

// Says what changed to those who do not see it.
function announceChanges() {
  const said = [];
  for (const each of models()) {
    const now = each.status.summary;
    if (summaries.has(each.name) && summaries.get(each.name) !== now) said.push(`${each.name}: ${now}`);
    summaries.set(each.name, now);
  }
  if (said.length) say(announce, said.join(". "));
}

function changed() {
  const [word, text] = STATES[world.state];
  say(stateText, word);
  mark(stateNode, "data-state", world.state);
  show(notice, Boolean(text && world.ping));
  tell(notice, text && world.seen && world.state !== "down" ? `${text} What is shown is from ${clock(world.seen)}.` : text ?? "");
  mark(main, "data-stale", world.state !== "live" && world.ping ? "" : null);
  if (world.ping) {
    say(document.getElementById("about"), `Quire ${world.ping.version} · ${world.ping.stateDir}`);
    route(false);
    view.node.update();
    announceChanges();
  } else if (text) main.replaceChildren(el("div", { class: "empty big" }, el("h1", {}, word), tell(el("p"), text)));
}

const root = document.documentElement;
const button = document.getElementById("theme");
const themes = ["system", "light", "dark"];
function theme(wanted) {
  if (wanted === "system") delete root.dataset.theme;
  else root.dataset.theme = wanted;
  try { wanted === "system" ? localStorage.removeItem("quire.theme") : localStorage.setItem("quire.theme", wanted); } catch { /* until the page is loaded again */ }
  say(button, `Theme: ${wanted}`);
}
say(button, `Theme: ${root.dataset.theme ?? "system"}`);
button.addEventListener("click", () => theme(themes[(themes.indexOf(root.dataset.theme ?? "system") + 1) % 3]));

document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
addEventListener("hashchange", () => { if (takeToken()) lookNow(); route(true); });
takeToken();
follow(changed);
