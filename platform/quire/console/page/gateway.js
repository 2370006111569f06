// The gateway: where it listens and by which settings, and objects of other kinds.

import { cell, el, mark, say, show, sync, table } from "./dom.js";
import { world } from "./link.js";
import { chip, conditions, eventList, facts, section, standing, summary, time } from "./parts.js";

const LISTED = ["model", "gateway"];

/** A setting as words: what is in lists and groups, one behind the other. */
function words(value) {
  if (Array.isArray(value)) return value.map(words).join(", ") || "none";
  if (typeof value !== "object") return String(value);
  return Object.entries(value).filter(([, each]) => each !== null).map(([name, each]) => `${name} ${words(each)}`).join(", ");
}

export function gateway() {
  const state = chip();
  const [where, settings, process] = [facts("Where requests go"), facts("Settings"), facts("Processes")];
  const told = conditions();
  const events = eventList({ object: false });
  const started = time();
  const plain = el("p", { class: "empty" }, "There is no manifest of a gateway: it has its defaults.");
  const { node: others, body } = table("Other objects", [["Object", "grow"], ["State"], ["Message", "grow"]], "stacks");
  const beside = section("Routes, policies and sources", el("div", { class: "wide" }, others));
  const declared = section("Settings", plain, settings);
  const conditioned = section("Conditions", el("div", { class: "wide" }, told));
  const node = el("div", {},
    el("div", { class: "title" }, el("h1", { tabindex: "-1" }, "Gateway"), state),
    section("Where requests go", where),
    declared, conditioned, beside,
    section("Processes", process, el("p", { class: "quiet" }, "Control plane started ", started)),
    section("Events", events));
  node.update = () => {
    const ping = world.ping;
    const found = world.objects.find((object) => object.kind === "gateway");
    state.tell(found ? standing(found) : ping.router.ready ? "good" : "going", found?.status.summary ?? (ping.router.ready ? "Listening" : "Not listening"));
    where.update([
      ["OpenAI API", ping.router.baseUrl],
      ["Anthropic API", ping.router.baseUrl.replace(/\/v1$/, "")],
      ["Certificate", ping.router.certificate],
      ["Not reachable", found?.status.endpoints?.unavailable ?? world.problem],
    ]);
    show(plain, !found);
    const spec = found?.resolved ?? {};
    settings.update(Object.entries(spec).filter(([, value]) => value !== null).map(([name, value]) => [name, words(value)]));
    show(conditioned, Boolean(found));
    if (found) told.update(found);
    const rest = world.objects.filter((object) => !LISTED.includes(object.kind));
    show(beside, rest.length > 0);
    sync(body, rest, (object) => `${object.kind}/${object.name}`, () => {
      const name = el("a", { class: "name" });
      const chipped = chip();
      const message = el("span", { class: "message" });
      const row = el("tr", {}, cell("Object", "grow", name), cell("State", "", chipped), cell("Message", "grow", message));
      row.update = (object) => {
        say(name, `${object.kind}/${object.name}`);
        mark(name, "href", object.kind === "gitsource" ? `#/sources/${encodeURIComponent(object.name)}` : null);
        chipped.tell(standing(object), summary(object));
        say(message, object.status.conditions?.find((each) => each.type === "Ready")?.message ?? "");
      };
      return row;
    });
    process.update([["Router", ping.router.pid ? `pid ${ping.router.pid}` : "does not run"], ["Control plane", `pid ${ping.pid}`], ["Version", ping.version], ["State folder", ping.stateDir], ["Supervisor", ping.supervisor]]);
    started.tell(ping.startedAt);
    mark(started, "class", "num");
    events.update(world.events.filter((event) => event.object === "gateway/default").reverse());
  };
  return { node, title: "Gateway" };
}
