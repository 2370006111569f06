// Lines over the last ten minutes, drawn as SVG. What a line shows is said as well: the values now, those at a point in
// time that the pointer or the arrow keys choose, and all minutes in a table.

import { el, mark, say, svg, sync } from "./dom.js";
import { clock, span } from "./words.js";

const MINUTES = 10;
const HEIGHT = 132;
const LEFT = 46;
const RIGHT = 6;
const TOP = 8;
const BOTTOM = 20;

// The next round number above: 1, 2 or 5 times a power of ten.
function ceiling(value, least) {
  const wanted = Math.max(value, least);
  const power = 10 ** Math.floor(Math.log10(wanted));
  for (const step of [1, 2, 5, 10]) if (step * power >= wanted * 0.999) return step * power;
  return 10 * power;
}

// Without the zeros that keep a changing figure in its place.
const short = (text) => text.replace(/\.0+(?=\D|$)/, "").replace(/(\.\d*?)0+(?=\D|$)/, "$1");

// `lines`: [{name, of: () => [{at, value}]}], at most two. `least`: what the scale shows at any rate; `most`: never more.
export function chart(title, lines, format, { least = 1, most = Infinity } = {}) {
  const plot = svg("svg", { class: "plot", "aria-hidden": "true", height: HEIGHT });
  const grid = svg("g", { class: "grid" });
  const shapes = lines.map((_, at) => svg("path", { class: `line line-${at}` }));
  const area = svg("path", { class: "area" });
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  plot.append(grid, area, ...shapes, cursor);
  const values = lines.map((line, at) => {
    const value = el("span", { class: "value" });
    return { node: el("span", { class: "key" }, svg("svg", { class: "swatch", width: 18, height: 8, "aria-hidden": "true" }, svg("line", { class: `line line-${at}`, x1: 0, x2: 18, y1: 4, y2: 4 })), el("span", {}, line.name), value), value };
  });
  const when = el("span", { class: "when" }, "now");
  const body = el("tbody");
  const pane = el("div", { class: "pane", tabindex: "0", role: "slider", "aria-label": `${title}: a point in time`, "aria-valuemin": -60 * MINUTES, "aria-valuemax": 0, "aria-valuenow": 0 }, plot);
  const node = el("figure", { class: "chart" },
    el("figcaption", {}, el("h3", {}, title), when),
    el("p", { class: "keys" }, values.map((value) => value.node)),
    pane,
    el("details", {}, el("summary", {}, "As a table"),
      el("table", {}, el("caption", { class: "unseen" }, `${title}, by the minute`),
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Time"), lines.map((line) => el("th", { scope: "col", class: "num" }, line.name)))), body)),
  );
  let data = lines.map(() => []);
  let back = 0; // seconds before now that the cursor stands at
  let width = 0;

  const end = () => Math.max(...data.map((points) => points.at(-1)?.at ?? 0));
  const at = (points, time) => points.reduce((best, point) => (Math.abs(point.at - time) < Math.abs((best?.at ?? Infinity) - time) ? point : best), null);

  function tell() {
    const time = end() - back;
    const found = data.map((points) => at(points, time)?.value ?? null);
    found.forEach((value, index) => say(values[index].value, value === null ? "–" : format(value)));
    const words = back ? `${span(back)} ago` : "now";
    say(when, words);
    mark(pane, "aria-valuenow", -Math.round(back));
    mark(pane, "aria-valuetext", `${words}: ${lines.map((line, index) => `${line.name} ${found[index] === null ? "none" : format(found[index])}`).join(", ")}`);
    const x = LEFT + (width - LEFT - RIGHT) * (1 - back / (60 * MINUTES));
    mark(cursor, "x1", x); mark(cursor, "x2", x);
    mark(cursor, "visibility", back ? "visible" : "hidden");
  }

  function draw() {
    if (width < 80) return;
    mark(plot, "width", width);
    mark(plot, "viewBox", `0 0 ${width} ${HEIGHT}`);
    const all = data.flat().map((point) => point.value).filter((value) => value !== null);
    const top = Math.min(ceiling(Math.max(0, ...all), least), most);
    const last = end();
    const x = (time) => LEFT + (width - LEFT - RIGHT) * (1 - (last - time) / (60 * MINUTES));
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - Math.min(value, top) / top);
    sync(grid, [0, 0.5, 1], (share) => `y${share}`, (share) => {
      const text = svg("text", { x: LEFT - 8, "text-anchor": "end" });
      const rule = svg("line", { x1: LEFT });
      const group = svg("g", {}, rule, text);
      group.update = () => {
        const height = y(share * top);
        mark(rule, "x2", width - RIGHT); mark(rule, "y1", height); mark(rule, "y2", height);
        mark(text, "y", height + 3.5); say(text, short(format(share * top)));
      };
      return group;
    });
    ticks.forEach((text, index) => { mark(text, "x", LEFT + (width - LEFT - RIGHT) * index / 2); mark(text, "y", HEIGHT - 4); });
    data.forEach((points, index) => {
      let path = "";
      let fill = "";
      let run = [];
      const close = () => {
        if (run.length > 1) {
          path += `M${run.join("L")}`;
          fill += `M${run[0].split(",")[0]},${y(0)}L${run.join("L")}L${run.at(-1).split(",")[0]},${y(0)}Z`;
        } else if (run.length === 1) path += `M${run[0]}h1.5`;
        run = [];
      };
      for (const point of points) {
        if (point.at < last - 60 * MINUTES) continue;
        if (point.value === null) close();
        else run.push(`${x(point.at).toFixed(1)},${y(point.value).toFixed(1)}`);
      }
      close();
      mark(shapes[index], "d", path || "M0,0");
      if (index === 0) mark(area, "d", fill || "M0,0");
    });
    tell();
  }

  const ticks = ["10 min ago", "5 min", "now"].map((word, index) => svg("text", { class: "tick", "text-anchor": ["start", "middle", "end"][index] }, word));
  plot.append(...ticks);
  new ResizeObserver(([entry]) => { width = Math.floor(entry.contentRect.width); draw(); }).observe(pane);
  const move = (to) => { back = Math.min(Math.max(to, 0), 60 * MINUTES); tell(); };
  pane.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    move(60 * MINUTES * (1 - (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)));
  });
  pane.addEventListener("pointerleave", () => move(0));
  pane.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: back + 10, ArrowRight: back - 10, PageUp: back + 60, PageDown: back - 60, Home: 60 * MINUTES, End: 0 };
    if (event.key in steps) { event.preventDefault(); move(steps[event.key]); }
  });
  pane.addEventListener("blur", () => move(0));

  function minutes() {
    const rows = [];
    const last = end();
    for (let minute = 0; minute < MINUTES && last; minute += 1) {
      const found = data.map((points) => at(points, last - 60 * minute));
      if (found[0] && Math.abs(found[0].at - (last - 60 * minute)) < 30) rows.push({ minute, found });
    }
    sync(body, rows, (row) => row.minute, () => {
      const time = el("td");
      const cells = lines.map(() => el("td", { class: "num" }));
      const node = el("tr", {}, time, cells);
      node.update = (row) => {
        say(time, clock(1000 * row.found[0].at));
        row.found.forEach((point, index) => say(cells[index], point?.value == null ? "–" : format(point.value)));
      };
      return node;
    });
  }

  node.update = () => { data = lines.map((line) => line.of()); draw(); minutes(); };
  return node;
}

// A line without axes, for a row of a table: it only repeats what the row says.
export function spark() {
  const path = svg("path", { class: "line line-0" });
  const node = svg("svg", { class: "spark", viewBox: "0 0 96 22", width: 96, height: 22, "aria-hidden": "true" }, path);
  node.update = (points) => {
    const shown = points.filter((point) => point.value !== null);
    const top = Math.max(1, ...shown.map((point) => point.value));
    const last = shown.at(-1)?.at ?? 0;
    const spots = shown.map((point) => `${(96 * (1 - (last - point.at) / (60 * MINUTES))).toFixed(1)},${(21 - 19 * point.value / top).toFixed(1)}`);
    mark(path, "d", spots.length > 1 ? `M${spots.join("L")}` : "M0,21H96");
  };
  return node;
}
