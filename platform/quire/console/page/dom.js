// Elements and lists of them. All that comes from outside becomes text, never markup: there is no call here that
// reads markup, and the page's policy forbids the browser's own.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, given, children) {
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === "data") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const el = (name, given = {}, ...children) => fill(document.createElement(name), given, children);

export const svg = (name, given = {}, ...children) => fill(document.createElementNS(SVG, name), given, children);

// Writes only what is new, so that a selection or a screen reader's place in an unchanged text stays.
export function say(node, text) {
  const wanted = String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
  return node;
}

// As `say`, with `commands` between backticks.
export function tell(node, text) {
  if (node.told === text) return node;
  node.told = text;
  node.replaceChildren(...text.split("`").map((part, at) => (at % 2 ? el("code", {}, part) : part)));
  return node;
}

export function mark(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  return node;
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
  return node;
}

// Makes the children of `parent` those of `items`, by key: `make` gives a node with an `update` function on it.
export function sync(parent, items, key, make) {
  const before = parent.rowsByKey ?? new Map();
  const after = new Map();
  let at = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    const node = before.get(name) ?? make(item);
    after.set(name, node);
    node.update?.(item);
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
  }
  for (const [name, node] of before) if (after.get(name) !== node) node.remove();
  parent.rowsByKey = after;
}

// A table with a caption for those who do not see it, and cells that say their column where it is narrow.
export function table(caption, columns, wide = "") {
  const body = el("tbody");
  const head = el("tr", {}, columns.map(([title, kind]) => el("th", { scope: "col", class: kind }, title)));
  const node = el("table", { class: wide }, el("caption", { class: "unseen" }, caption), el("thead", {}, head), body);
  return { node, body };
}

export const cell = (title, kind, ...children) =>
  el("td", { class: kind, data: { title } }, el("div", {}, children));
