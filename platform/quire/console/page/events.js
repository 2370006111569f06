// Everything that was decided and seen, as it happens.

import { el, say, show, sync } from "./dom.js";
import { world } from "./link.js";
import { eventList } from "./parts.js";
import { count } from "./words.js";

const SHOWN = 300;

export function events() {
  const list = eventList();
  const whose = el("select", { id: "event-object" });
  const warnings = el("input", { type: "checkbox", id: "event-warnings" });
  const following = el("input", { type: "checkbox", id: "event-follow", checked: true });
  const news = el("button", { type: "button", class: "quiet", hidden: true });
  const held = el("p", { class: "quiet", role: "status" });
  const node = el("div", {},
    el("h1", { tabindex: "-1" }, "Events"),
    el("div", { class: "controls" },
      el("label", { for: "event-object" }, "Of"), whose,
      el("label", { class: "check" }, warnings, "Warnings only"),
      el("label", { class: "check" }, following, "Follow"), news, held),
    el("section", { class: "card" }, el("h2", { class: "unseen" }, "Events, newest first"), list));
  let frozen = null; // what is shown while nothing is followed

  const fits = (event) => (!whose.value || event.object === whose.value) && (!warnings.checked || event.type === "Warning");
  node.update = () => {
    const all = frozen ?? world.events;
    const objects = ["", ...new Set([...world.objects.map((object) => `${object.kind}/${object.name}`), ...world.events.map((event) => event.object)].sort())];
    sync(whose, objects, (name) => name, (name) => el("option", { value: name }, name || "everything"));
    const found = all.filter(fits);
    list.update(found.slice(-SHOWN).reverse());
    say(held, found.length > SHOWN ? `The newest ${SHOWN} of ${found.length}. All: platform events` : "");
    const before = new Map(frozen?.map((event) => [event.id, event.count]));
    const fresh = frozen ? world.events.filter((event) => fits(event) && before.get(event.id) !== event.count).length : 0;
    show(news, fresh > 0);
    say(news, `Show ${count(fresh, "new event")}`);
  };
  const follow = (wanted) => { following.checked = wanted; frozen = wanted ? null : world.events; node.update(); };
  following.addEventListener("change", () => follow(following.checked));
  news.addEventListener("click", () => { frozen = world.events; node.update(); following.focus(); });
  whose.addEventListener("change", () => node.update());
  warnings.addEventListener("change", () => node.update());
  return { node, title: "Events" };
}
