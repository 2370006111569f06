// One git source: the commit that is applied, why a newer one is not, what each of the last ones changed, and its objects.

import { cell, el, say, show, sync, table } from "./dom.js";
import { world } from "./link.js";
import { chip, conditions, eventList, facts, section, standing, summary, time } from "./parts.js";
import { count } from "./words.js";

const RESULTS = { Applied: "good", Healed: "good", Refused: "bad" };
const place = (each) => `${each.file}:${each.line}:${each.col}`;

function commits() {
  const { node, body } = table("Commits, newest first", [["Commit"], ["Result"], ["What", "grow"], ["Subject", "grow"], ["When"]], "stacks");
  node.update = (source) => sync(body, source.status.history ?? [], (each) => `${each.commit} ${each.at} ${each.result}`, () => {
    const [commit, what, subject] = [el("code"), el("span", { class: "message" }), el("span", { class: "message" })];
    const [result, when] = [chip(), time()];
    const row = el("tr", {}, cell("Commit", "", commit), cell("Result", "", result), cell("What", "grow", what), cell("Subject", "grow", subject), cell("When", "quiet", when));
    row.update = (each) => {
      say(commit, each.commit.slice(0, 12));
      result.tell(RESULTS[each.result] ?? "plain", each.result);
      say(what, each.changed.join(", ") || each.message || "no change");
      say(subject, each.subject);
      when.tell(each.at);
    };
    return row;
  });
  return node;
}

function objects() {
  const { node, body } = table("Objects", [["Object", "grow"], ["State"], ["File", "grow"], ["Commit"]], "stacks");
  node.update = (source) => sync(body, source.status.objects ?? [], (each) => each.key, () => {
    const [name, file, commit, state] = [el("a", { class: "name" }), el("code"), el("code"), chip()];
    const row = el("tr", {}, cell("Object", "grow", name), cell("State", "", state), cell("File", "grow", file), cell("Commit", "", commit));
    row.update = (each) => {
      const [kind, known] = each.key.split("/", 2);
      const found = world.objects.find((object) => object.kind === kind && object.name === known);
      say(name, each.key);
      if (kind === "model") name.href = `#/models/${encodeURIComponent(known)}`;
      state.tell(found ? standing(found) : "bad", found ? summary(found) : "It is gone");
      say(file, each.file);
      say(commit, each.commit.slice(0, 12));
    };
    return row;
  });
  return node;
}

export function source(name) {
  const [state, told, history, mine] = [chip(), conditions(), commits(), objects()];
  const where = facts("What it follows");
  const wrong = el("ul", { class: "problems" });
  const problems = section("Why the newest commit is not applied", wrong);
  const events = eventList({ object: false });
  const gone = el("p", { class: "empty big" }, "There is no such source. It may have been deleted.");
  const all = el("div", {},
    section("What it follows", where), problems,
    section("Conditions", el("div", { class: "wide" }, told)),
    section("Commits", el("div", { class: "wide" }, history)),
    section("Objects", el("div", { class: "wide" }, mine)),
    section("Events", events));
  const node = el("div", {}, el("div", { class: "title" }, el("h1", { tabindex: "-1" }, name), state), gone, all);
  node.update = () => {
    const found = world.objects.find((object) => object.kind === "gitsource" && object.name === name);
    for (const each of [state, all]) show(each, Boolean(found));
    show(gone, !found);
    if (!found) return;
    const { status } = found;
    state.tell(standing(found), summary(found));
    where.update([
      ["Repository", found.resolved.url], ["Follows", status.ref], ["Folder", found.resolved.path],
      ["Applied", status.lastAppliedRevision ?? "no commit yet"],
      ["Tried last", status.lastAttemptedRevision !== status.lastAppliedRevision ? status.lastAttemptedRevision : null],
      ["Kept, though it left", (status.kept ?? []).join(", ")],
      ["When it is deleted", found.resolved.deletionPolicy === "Delete" ? `${count(status.objects?.length ?? 0, "object")} of it are deleted, too` : "its objects stay"],
    ]);
    show(problems, Boolean(status.problems?.length));
    sync(wrong, status.problems ?? [], (each) => `${place(each)} ${each.path} ${each.message}`, () => {
      const [at, text, hint] = [el("code"), el("span", { class: "message" }), el("span", { class: "quiet" })];
      const row = el("li", {}, at, " ", text, " ", hint);
      row.update = (each) => {
        say(at, place(each));
        say(text, each.path ? `${each.path}: ${each.message}` : each.message);
        say(hint, each.hint ?? "");
      };
      return row;
    });
    for (const each of [told, history, mine]) each.update(found);
    events.update(world.events.filter((event) => event.object === `gitsource/${name}`).reverse());
  };
  return { node, title: name };
}
