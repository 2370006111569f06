// One model: where it stands and why, its rollout, its replicas, its load, and what the manifest became.

import { chart } from "./charts.js";
import { cell, el, mark, say, show, sync, table } from "./dom.js";
import { figures, models, past, world } from "./link.js";
import { chip, conditions, eventList, facts, section, standing, time } from "./parts.js";
import { bytes, count, number, percent, seconds } from "./words.js";

const STEPS = ["accepted", "weights", "device", "loaded", "ready"];
const REPLICA = { Ready: "good", Failed: "bad", Backoff: "bad", Pending: "going", Starting: "going", Draining: "idle", Stopping: "idle" };
const REVISION = { Current: "good", Stable: "good", Pinned: "good", RolledBack: "bad", Leaving: "going" };

function steps() {
  const list = el("ol", { class: "steps", "aria-label": "From apply to the first answer" });
  list.update = (progress) => sync(list, STEPS, (step) => step, (step) => {
    const state = chip();
    const detail = el("span", { class: "quiet num" });
    const item = el("li", {}, state, detail);
    item.update = () => {
      const found = progress?.[step];
      const begun = STEPS.find((name) => !progress?.[name]?.ok) === step;
      state.tell(found?.ok ? "good" : begun ? "going" : "idle", step);
      const part = found && !found.ok && found.bytes ? `${bytes(found.bytesDone ?? 0)} of ${bytes(found.bytes)}` : "";
      say(detail, part || (found?.seconds != null ? seconds(found.seconds) : ""));
    };
    return item;
  });
  return list;
}

function replicas() {
  const { node, body } = table("Replicas", [["Replica", "grow"], ["State"], ["Revision", "num"], ["Devices"], ["Restarts", "num"], ["Since"]], "stacks");
  node.update = (model) => sync(body, model.replicas, (replica) => replica.id, () => {
    const id = el("span", { class: "name" });
    const why = el("span", { class: "message" });
    const lines = el("pre", { tabindex: "0", "aria-label": "The last lines of its log" });
    const last = el("details", { class: "last", hidden: true }, el("summary", {}, "What it said last"), lines);
    const state = chip();
    const [revision, devices, restarts] = [el("span"), el("span"), el("span")];
    const since = time();
    const row = el("tr", {}, cell("Replica", "grow", id, why, last), cell("State", "", state), cell("Revision", "num", revision), cell("Devices", "", devices), cell("Restarts", "num", restarts), cell("Since", "quiet", since));
    row.update = (replica) => {
      say(id, replica.id);
      say(why, [replica.reason, replica.message || replica.lastExit?.message].filter((text) => text).join(": "));
      show(last, Boolean(replica.lastExit?.log?.length));
      say(lines, replica.lastExit?.log?.join("\n") ?? "");
      state.tell(REPLICA[replica.state] ?? "going", replica.state);
      say(revision, replica.revision); say(devices, replica.devices.join(", ") || "–"); say(restarts, replica.restarts);
      since.tell(replica.since);
    };
    return row;
  });
  return node;
}

function revisions() {
  const { node, body } = table("Revisions, newest first", [["Revision", "num"], ["State"], ["Cause", "grow"], ["Loaded in", "num"], ["Made"], ["Rolled out"]], "stacks");
  node.update = (model) => sync(body, model.revisions, (revision) => revision.revision, () => {
    const [number_, cause, load] = [el("span"), el("span"), el("span")];
    const state = chip();
    const [made, stable] = [time(), time()];
    const row = el("tr", {}, cell("Revision", "num", number_), cell("State", "", state), cell("Cause", "grow", cause), cell("Loaded in", "num", load), cell("Made", "quiet", made), cell("Rolled out", "quiet", stable));
    row.update = (revision) => {
      say(number_, revision.revision);
      state.tell(REVISION[revision.state] ?? "idle", revision.state);
      say(cause, [revision.cause, revision.failure].filter((text) => text).join(": "));
      say(load, revision.loadSeconds === null ? "–" : seconds(revision.loadSeconds));
      made.tell(revision.createdAt); stable.tell(revision.stableAt);
    };
    return row;
  });
  return node;
}

// How the memory of one replica is shared out.
function memory() {
  const parts = ["Weights", "KV cache", "Activations and overhead"].map((name, at) => {
    const size = el("span", { class: "num" });
    return { name, size, bar: el("span", { class: `part part-${at}` }), key: el("li", {}, el("span", { class: `swatch part-${at}`, "aria-hidden": "true" }), `${name} `, size) };
  });
  const bar = el("div", { class: "shares", "aria-hidden": "true" }, parts.map((part) => part.bar));
  const node = el("div", {}, bar, el("ul", { class: "keys" }, parts.map((part) => part.key)));
  node.update = (model) => {
    const resolved = model.status.resolved ?? {};
    const total = resolved.memoryPerReplica;
    const weights = model.status.progress?.weights?.bytes ?? 0;
    const kv = resolved.kvCacheSize ?? 0;
    show(node, Boolean(total));
    [weights, kv, Math.max((total ?? 0) - weights - kv, 0)].forEach((value, at) => {
      parts[at].bar.style.flexGrow = String(Math.max(value / (total || 1), 0.004));
      say(parts[at].size, bytes(value));
    });
  };
  return node;
}

// Nested values as indented text.
function outline(value, depth = 0) {
  const pad = "  ".repeat(depth);
  if (value === null || typeof value !== "object") return String(JSON.stringify(value));
  if (Array.isArray(value)) return value.length ? value.map((item) => `\n${pad}- ${outline(item, depth + 1).trimStart()}`).join("") : "[]";
  const pairs = Object.entries(value);
  return pairs.length ? pairs.map(([name, item]) => {
    const text = outline(item, depth + 1);
    return `\n${pad}${name}:${text.startsWith("\n") ? text : ` ${text}`}`;
  }).join("") : "{}";
}

export function model(name) {
  const state = chip();
  const about = facts("Rollout");
  const remedies = el("ul");
  const callout = el("div", { class: "callout", hidden: true }, el("p", {}, el("strong", {}, "What you can do")), remedies);
  const [progress, told, listed, kept, shares, events] = [steps(), conditions(), replicas(), revisions(), memory(), eventList({ object: false })];
  const memoryFacts = facts("Memory of one replica");
  const noReplicas = el("p", { class: "empty" }, "No replica runs.");
  const resolved = el("pre", { tabindex: "0", "aria-label": "The spec with all defaults" });
  const play = el("a", { class: "button", href: `#/playground/${encodeURIComponent(name)}` }, "Try it in the playground");
  const of = (field) => () => past(name, field);
  const charts = [
    chart("Tokens a second", [{ name: "written", of: of("outTokensPerSecond") }, { name: "read", of: of("inTokensPerSecond") }], number, { least: 10 }),
    chart("Time to first token", [{ name: "p50", of: of("ttftP50") }, { name: "p95", of: of("ttftP95") }], seconds, { least: 0.1 }),
    chart("Requests", [{ name: "running", of: of("running") }, { name: "waiting", of: () => sum(of("waiting")(), of("held")()) }], number, { least: 4 }),
    chart("KV cache in use", [{ name: "share", of: of("kv") }], percent, { least: 0.1, most: 1 }),
  ];
  const gone = el("div", { class: "empty big", hidden: true }, el("p", {}, el("strong", {}, "There is no such model.")), el("p", {}, el("a", { href: "#/" }, "All models")));
  const present = el("div", {},
    callout,
    section("Rollout", about, progress),
    el("div", { class: "charts" }, charts.map((each) => el("div", { class: "card" }, each))),
    section("Replicas", el("div", { class: "wide" }, listed), noReplicas),
    section("Memory of one replica", shares, memoryFacts),
    section("Conditions", el("div", { class: "wide" }, told)),
    section("Revisions", el("div", { class: "wide" }, kept)),
    section("Events", events),
    section("Spec", el("p", { class: "quiet" }, "As the manifest says, with all defaults, frozen when it was applied. Change the manifest to change it."), el("details", {}, el("summary", {}, "Show the whole spec"), resolved)));
  const title = el("h1", { tabindex: "-1" }, name);
  const node = el("div", {}, el("p", { class: "crumbs" }, el("a", { href: "#/" }, "Models"), " / "), el("div", { class: "title" }, title, state, play), gone, present);

  node.update = () => {
    const found = models().find((each) => each.name === name);
    show(gone, !found); show(present, Boolean(found)); show(play, Boolean(found)); show(state, Boolean(found));
    if (!found) return;
    const status = found.status;
    const now = figures(name);
    state.tell(standing(found), status.summary ?? "New");
    show(callout, Boolean(status.remedies?.length));
    sync(remedies, status.remedies ?? [], (text) => text, (text) => {
      const [command, ...why] = text.split(/ {2,}/);
      return el("li", {}, why.length ? el("code", {}, command) : command, why.length ? ` ${why.join(" ")}` : "");
    });
    const counts = status.replicas;
    about.update([
      ["Serves revision", status.servedRevision ?? "none"],
      ["Rolls out", status.rollout && !status.rollout.settled ? `revision ${status.rollout.revision}${status.rollout.held ? ", held" : ""}` : null],
      ["Strategy", status.rollout?.strategy],
      ["Replicas", counts ? `${counts.ready} of ${counts.desired} ready, ${counts.updated} updated${counts.draining ? `, ${counts.draining} draining` : ""}` : null],
      ["Names", status.endpoints?.modelNames?.join(", ")],
      ["Source", found.resolved.source],
      ["Decided beside the manifest", status.overrides?.map((each) => `${each.kind} by ${each.by}${each.reason ? ` (${each.reason})` : ""}`).join(", ")],
    ]);
    progress.update(status.progress);
    charts.forEach((each) => each.update());
    listed.update(found); show(listed, found.replicas.length > 0); show(noReplicas, !found.replicas.length);
    shares.update(found);
    const became = status.resolved ?? {};
    memoryFacts.update([
      ["In all", bytes(became.memoryPerReplica)],
      ["KV cache holds", became.kvTokensPerReplica ? count(became.kvTokensPerReplica, "token") : null],
      ["KV in use now", now ? percent(now.kv) : null],
      ["Longest context", became.maxModelLen ? count(became.maxModelLen, "token") : null],
      ["Device", became.device], ["Numbers", became.dtype], ["KV numbers", became.kvDtype],
    ]);
    told.update(found);
    kept.update(found);
    events.update(world.events.filter((event) => event.object === `model/${name}`).reverse());
    say(resolved, outline(found.resolved).trimStart());
    mark(state, "title", status.conditions?.find((each) => each.type === "Ready")?.message || null);
  };
  return { node, title: name };
}

const sum = (some, others) => some.map((point, at) => ({ at: point.at, value: point.value === null ? null : point.value + (others[at]?.value ?? 0) }));
