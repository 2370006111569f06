// All models: where each stands, and what it does now.

import { spark } from "./charts.js";
import { cell, el, mark, say, show, sync, table } from "./dom.js";
import { figures, models, past, world } from "./link.js";
import { chip, eventList, meter, section, standing } from "./parts.js";
import { number, percent, seconds } from "./words.js";

const LATEST = 8;

function tile(label) {
  const value = el("dd");
  const node = el("div", { class: "tile" }, el("dt", {}, label), value);
  node.tell = (text) => say(value, text);
  return node;
}

function row() {
  const name = el("a", { class: "name" });
  const state = chip();
  const replicas = el("span");
  const revision = el("span");
  const speed = el("span", { class: "num" });
  const line = spark();
  const ttft = el("span");
  const busy = el("span");
  const kv = meter("Share of the KV cache in use");
  const node = el("tr", {},
    cell("Model", "grow", name), cell("State", "", state), cell("Replicas", "num", replicas), cell("Revision", "num", revision),
    cell("Tokens/s", "num trend", line, speed), cell("TTFT p50 / p95", "num", ttft), cell("Running / waiting", "num", busy), cell("KV cache", "", kv));
  node.update = (model) => {
    say(name, model.name);
    mark(name, "href", `#/models/${encodeURIComponent(model.name)}`);
    state.tell(standing(model), model.status.summary ?? "New");
    const counts = model.status.replicas;
    say(replicas, counts ? `${counts.ready}/${counts.desired}` : "–");
    say(revision, model.status.servedRevision ?? "–");
    const now = figures(model.name);
    say(speed, now ? number(now.outTokensPerSecond) : "–");
    line.update(past(model.name, "outTokensPerSecond"));
    say(ttft, now ? `${seconds(now.ttftP50)} / ${seconds(now.ttftP95)}` : "–");
    say(busy, now ? `${number(now.running)} / ${number(now.waiting + now.held)}` : "–");
    kv.tell(now?.kv, now ? percent(now.kv) : "–");
  };
  return node;
}

export function overview() {
  const serving = tile("Models that serve");
  const speed = tile("Tokens a second");
  const running = tile("Requests in flight");
  const waiting = tile("Waiting");
  const { node: listed, body } = table("Models", [["Model", "grow"], ["State"], ["Replicas", "num"], ["Revision", "num"], ["Tokens/s", "num trend"], ["TTFT p50 / p95", "num"], ["Running / waiting", "num"], ["KV cache"]], "stacks models");
  const problem = el("p", { class: "callout", hidden: true });
  const empty = el("div", { class: "empty big", hidden: true },
    el("p", {}, el("strong", {}, "Nothing is served yet.")),
    el("p", {}, "Apply a manifest, and the model appears here while it starts:"),
    el("pre", { tabindex: "0" }, el("code", {}, "platform apply manifests/quickstart.yaml")));
  const events = eventList();
  const node = el("div", {},
    el("h1", { tabindex: "-1" }, "Models"),
    el("dl", { class: "tiles" }, serving, speed, running, waiting),
    problem,
    el("section", { class: "card flush" }, el("h2", { class: "unseen" }, "All models"), empty, el("div", { class: "wide" }, listed)),
    section("Latest events", events, el("p", {}, el("a", { href: "#/events" }, "All events"))));
  node.update = () => {
    const all = models();
    const now = all.map((model) => figures(model.name)).filter((found) => found);
    const sum = (of) => now.reduce((total, found) => total + of(found), 0);
    serving.tell(`${all.filter((model) => standing(model) === "good").length} of ${all.length}`);
    speed.tell(now.length ? number(sum((found) => found.outTokensPerSecond)) : "–");
    running.tell(now.length ? number(sum((found) => found.inFlight)) : "–");
    waiting.tell(now.length ? number(sum((found) => found.waiting + found.held)) : "–");
    show(problem, Boolean(world.problem && all.length));
    say(problem, `No figures now: ${world.problem}`);
    show(empty, !all.length && world.state !== "down");
    show(listed, all.length > 0);
    sync(body, all, (model) => model.name, row);
    events.update(world.events.slice(-LATEST).reverse());
  };
  return { node, title: "Models" };
}
