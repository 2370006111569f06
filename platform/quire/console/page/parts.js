// What several views show alike: where an object stands, its conditions, events.

import { cell, el, mark, say, show, svg, sync, table } from "./dom.js";
import { ago, clock } from "./words.js";

const condition = (object, type) => object.status.conditions?.find((each) => each.type === type);
export const is = (object, type) => condition(object, type)?.status === "True";

// good, going (something is under way), bad, or idle: nothing runs, and nothing is to.
export function standing(object) {
  if (is(object, "Stalled")) return "bad";
  if (object.deleting) return "going";
  if (is(object, "Ready")) return object.kind === "model" && !is(object, "RolledOut") ? "going" : "good";
  if (object.kind === "model" && object.status.replicas?.desired === 0) return "idle";
  return "going";
}

// Where it stands, in a word or two: what a source says behind it is in its conditions.
export function summary(object) {
  const words = object.status.summary ?? "New";
  return object.kind === "gitsource" ? words.split(": ")[0] : words;
}

const SHAPES = {
  good: "M5 1a4 4 0 1 0 .01 0z", going: "M5 1.700a3.300 3.300 0 1 0 .01 0M5 1.700v3.300h3",
  bad: "M5 .8L9.600 9H.4z", idle: "M5 1.700a3.300 3.300 0 1 0 .01 0z", plain: "",
};

// Where something stands: a shape and a word, so that the colour is not alone.
export function chip() {
  const path = svg("path");
  const text = el("span");
  const node = el("span", { class: "chip" }, svg("svg", { viewBox: "0 0 10 10", width: 10, height: 10, "aria-hidden": "true" }, path), text);
  node.tell = (kind, word) => {
    mark(node, "data-kind", kind);
    mark(path, "d", SHAPES[kind]);
    say(text, word);
    return node;
  };
  return node;
}

export function time(stamp, words = ago) {
  const node = el("time");
  node.tell = (at) => {
    say(node, at ? words(at) : "–");
    mark(node, "datetime", at);
    mark(node, "title", at ? new Date(at).toLocaleString("en-GB") : null);
    return node;
  };
  return stamp ? node.tell(stamp) : node;
}

export function section(title, ...children) {
  return el("section", { class: "card" }, el("h2", {}, title), children);
}

const BAD_WHEN_TRUE = ["Stalled", "Drifted"];

// What one type of condition says; those that are so and mean nothing bad are quiet.
export function conditions() {
  const { node, body } = table("Conditions", [["Condition"], ["Status"], ["Reason and message", "grow"], ["Since"]], "stacks");
  node.update = (object) => sync(body, object.status.conditions ?? [], (each) => each.type, () => {
    const type = el("span", { class: "name" });
    const state = chip();
    const reason = el("span", { class: "reason" });
    const message = el("span", { class: "message" });
    const since = time();
    const row = el("tr", {}, cell("Condition", "", type), cell("Status", "", state), cell("Reason", "grow", reason, " ", message), cell("Since", "quiet", since));
    row.update = (each) => {
      const wanted = BAD_WHEN_TRUE.includes(each.type) ? "False" : "True";
      say(type, each.type);
      state.tell(each.status === wanted ? "good" : each.type === "Stalled" && each.status === "True" ? "bad" : "going", each.status);
      say(reason, each.reason); say(message, each.message);
      since.tell(each.lastTransitionTime);
    };
    return row;
  });
  return node;
}

// Events, newest first. `object`: also whose they are.
export function eventList({ object = true } = {}) {
  const list = el("ol", { class: "events" });
  const empty = el("p", { class: "empty" }, "No events.");
  const node = el("div", {}, list, empty);
  node.update = (items) => {
    show(empty, !items.length);
    sync(list, items, (event) => event.id, () => {
      const when = time(null, clock);
      const kind = chip();
      const whose = el("a", { class: "object" });
      const message = el("span", { class: "message" });
      const often = el("span", { class: "often" });
      const row = el("li", {}, when, kind, object ? whose : null, message, often);
      row.update = (event) => {
        when.tell(event.lastSeen);
        kind.tell(event.type === "Warning" ? "bad" : "plain", event.reason);
        mark(row, "data-type", event.type);
        const [type, name] = event.object.split("/", 2);
        say(whose, event.object);
        mark(whose, "href", type === "model" ? `#/models/${encodeURIComponent(name)}` : type === "gitsource" ? `#/sources/${encodeURIComponent(name)}` : type === "gateway" ? "#/gateway" : null);
        say(message, event.message);
        say(often, event.count > 1 ? `${event.count} times` : "");
      };
      return row;
    });
  };
  return node;
}

// A share as a bar with its words beside it.
export function meter(label) {
  const bar = el("meter", { min: 0, max: 1, low: 0.8, high: 0.95, optimum: 0, "aria-label": label });
  const text = el("span", { class: "num" });
  const node = el("span", { class: "meter" }, bar, text);
  node.tell = (value, words) => {
    mark(bar, "value", value ?? 0);
    say(text, words);
  };
  return node;
}

export function facts(label) {
  const node = el("dl", { class: "facts", "aria-label": label });
  node.update = (pairs) => sync(node, pairs.filter(([, value]) => value !== null && value !== undefined && value !== ""), ([name]) => name, ([name]) => {
    const value = el("dd");
    const pair = el("div", {}, el("dt", {}, name), value);
    pair.update = ([, said]) => say(value, said);
    return pair;
  });
  return node;
}
