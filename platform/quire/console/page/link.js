// The way to the control plane: the token of the link, requests, and a look every two seconds.

const KEY = "quire.token";
const EVERY = 2000;
const HIDDEN = 10000;
const PATIENCE = 10000;
const POINTS = 300;

export class Trouble extends Error {
  constructor(status, error) {
    super(error?.message ?? `the answer was ${status}`);
    this.status = status;
    this.code = error?.code ?? "";
    this.hint = error?.hint ?? "";
  }
}

// What is known. `state`: wait, live, down (the platform is), lost (nobody answers), locked (the link counts no more).
export const world = {
  state: "wait", ping: null, objects: [], events: [], points: [], fields: [], problem: null, seen: null,
};

let token = null;
const tabs = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("quire");
const known = new Map();
let again = null;

// The token comes behind the # of a link, which no server is sent, and leaves the address at once.
export function takeToken() {
  const found = /^#token=([A-Za-z0-9_-]+)$/.exec(location.hash);
  if (found) {
    keep(found[1]);
    tabs?.postMessage(found[1]); // a page that was opened before, by a link that counts no more, goes on by this one
    history.replaceState(null, "", "#/");
    return true;
  }
  try { token ??= sessionStorage.getItem(KEY); } catch { /* it lasts as long as this page */ }
  return false;
}

function keep(given) {
  token = given;
  known.clear();
  try { sessionStorage.setItem(KEY, given); } catch { /* it lasts as long as this page */ }
}

const headers = (more = {}) => ({ authorization: `Bearer ${token ?? ""}`, ...more });

async function get(path, keeps = true) {
  const kept = known.get(path);
  const answer = await fetch(path, {
    headers: headers(kept ? { "if-none-match": kept.tag } : {}), cache: "no-store",
    signal: AbortSignal.timeout(PATIENCE),
  });
  if (answer.status === 304 && kept) return kept.body;
  const body = await answer.json().catch(() => null);
  if (!answer.ok) throw new Trouble(answer.status, body?.error);
  const tag = answer.headers.get("etag");
  if (tag && keeps) known.set(path, { tag, body });
  return body;
}

const gatewayKey = (key) => (key ? { "x-gateway-key": key } : {});

// The names that the router answers to.
export async function modelNames(key) {
  const answer = await fetch("/router/v1/models", { headers: headers(gatewayKey(key)), cache: "no-store" });
  const body = await answer.json().catch(() => null);
  if (!answer.ok) throw new Trouble(answer.status, body?.error);
  return body.data.map((card) => card.id);
}

// A streamed chat: its chunks, until [DONE]. Throws `Trouble` for an error, and for a stream that just ends.
export async function* chat(body, key, signal) {
  const answer = await fetch("/router/v1/chat/completions", {
    method: "POST", body: JSON.stringify(body), signal, cache: "no-store",
    headers: headers({ "content-type": "application/json", ...gatewayKey(key) }),
  });
  if (!answer.ok) throw new Trouble(answer.status, (await answer.json().catch(() => null))?.error);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Trouble(0, { message: "the stream broke off" });
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Trouble(0, chunk.error);
      yield chunk;
    }
  }
}

async function look() {
  const last = world.points.at(-1)?.n ?? 0;
  const [ping, load] = await Promise.all([get("/v1/ping"), get(`/v1/load?after=${last}`, false)]);
  const anew = world.ping?.startedAt !== ping.startedAt || load.items[0]?.n <= last;
  world.points = [...(anew ? [] : world.points), ...load.items].slice(-POINTS);
  Object.assign(world, { ping, fields: load.fields, problem: load.problem });
  const [objects, events] = await Promise.all([get("/v1/objects"), get("/v1/events")]);
  Object.assign(world, { objects: objects.items, events: events.items });
}

async function tick() {
  try {
    if (!token) throw new Trouble(401, null);
    await look();
    world.state = "live";
    world.seen = Date.now();
  } catch (error) {
    if (error instanceof Trouble && error.status === 401) world.state = "locked";
    else if (error instanceof Trouble && error.code === "down") world.state = "down";
    else world.state = "lost";
  }
}

// Looks now and again from now on; `changed` is called after each look.
export function follow(changed) {
  let timer = 0;
  let looking = false;
  const go = async () => {
    if (looking) return;
    looking = true;
    clearTimeout(timer);
    await tick();
    looking = false;
    changed();
    timer = setTimeout(go, document.hidden ? HIDDEN : EVERY);
  };
  if (tabs) tabs.onmessage = (message) => { if (world.state !== "live") { keep(String(message.data)); go(); } };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) go(); });
  again = go;
  go();
}

export const lookNow = () => again?.();

// The models' newest figures by name, and one figure over time.
export function figures(name) {
  const point = world.points.at(-1)?.models[name];
  return point ? Object.fromEntries(world.fields.map((field, at) => [field, point[at]])) : null;
}

export function past(name, field) {
  const at = world.fields.indexOf(field);
  return world.points.map((point) => {
    const found = point.models[name];
    return { at: point.at, value: found === undefined || at < 0 ? null : found[at] };
  });
}

export const models = () => world.objects.filter((object) => object.kind === "model");
