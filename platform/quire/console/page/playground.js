// A chat with a model, streamed as a client of the gateway would see it. The conversation is this page's alone.

import { el, mark, say, show, sync } from "./dom.js";
import { Trouble, chat, modelNames, models, world } from "./link.js";
import { number, seconds } from "./words.js";

const OURS = new Set(["model", "messages", "stream", "stream_options"]);
const state = { turns: [], draft: "", system: "", temperature: "0.7", most: "512", more: "", key: "", model: "" };

function turn(role) {
  const who = el("h3", {}, role === "user" ? "You" : "");
  const thought = el("p", { class: "said" });
  const thinking = el("details", { class: "thought", hidden: true }, el("summary", {}, "Reasoning"), thought);
  const said = el("p", { class: "said" });
  const calls = el("pre", { class: "calls", hidden: true, tabindex: "0", "aria-label": "Tool calls" });
  const note = el("p", { class: "note num" });
  const node = el("li", { class: role }, who, thinking, said, calls, note);
  node.update = (shown) => {
    if (role !== "user") say(who, shown.model);
    show(thinking, Boolean(shown.thought));
    grow(thought, shown.thought);
    grow(said, shown.text);
    const called = shown.calls.map((call) => `${call.name}(${call.arguments})`).join("\n");
    show(calls, Boolean(called));
    say(calls, called);
    say(note, shown.note);
    mark(node, "data-state", shown.state);
  };
  return node;
}

// Adds what is new of a text that only grows: a long answer is not laid out anew for each word.
function grow(node, text) {
  const kept = node.shownText ?? "";
  if (text === kept) return;
  if (kept && text.startsWith(kept)) node.append(text.slice(kept.length));
  else node.textContent = text;
  node.shownText = text;
}

export function playground(wanted) {
  if (wanted) state.model = wanted;
  const field = (id, label, input, hint) => el("p", { class: "field" }, el("label", { for: id }, label), input, hint ? el("span", { class: "hint", id: `${id}-hint` }, hint) : null);
  const keeping = (name) => ({ input: (event) => { state[name] = event.target.value; } });
  const chosen = el("select", { id: "play-model", on: { change: () => { state.model = chosen.value; } } });
  const temperature = el("input", { id: "play-temperature", type: "number", min: 0, max: 2, step: 0.1, inputmode: "decimal", on: keeping("temperature") });
  const most = el("input", { id: "play-most", type: "number", min: 1, step: 1, inputmode: "numeric", on: keeping("most") });
  const system = el("textarea", { id: "play-system", rows: 3, on: keeping("system") });
  const more = el("textarea", { id: "play-more", rows: 3, spellcheck: "false", "aria-describedby": "play-more-hint", on: keeping("more") });
  const key = el("input", { id: "play-key", type: "password", autocomplete: "off", "aria-describedby": "play-key-hint", on: keeping("key") });
  const draft = el("textarea", { id: "play-draft", rows: 3, "aria-describedby": "play-draft-hint", on: keeping("draft") });
  const send = el("button", { type: "submit", class: "primary" }, "Send");
  const halt = el("button", { type: "button", hidden: true }, "Stop");
  const clear = el("button", { type: "button", class: "quiet" }, "Clear");
  const problem = el("p", { class: "callout bad", role: "alert", hidden: true });
  const status = el("p", { class: "unseen", role: "status" });
  const log = el("ol", { class: "talk", "aria-label": "Conversation" });
  const empty = el("p", { class: "empty" }, "Ask something. The answer comes as the model writes it.");
  const form = el("form", { class: "ask" },
    el("label", { for: "play-draft" }, "Message"), draft,
    el("p", { class: "hint", id: "play-draft-hint" }, "Enter sends, Shift and Enter begin a new line, Escape stops an answer."),
    el("div", { class: "buttons" }, send, halt, clear));
  const options = el("details", { class: "card options" }, el("summary", {}, "Model and sampling"), el("form", { on: { submit: (event) => event.preventDefault() } },
    field("play-model", "Model", chosen),
    field("play-temperature", "Temperature", temperature),
    field("play-most", "Maximum tokens", most),
    field("play-system", "System message", system),
    field("play-more", "More fields, as JSON", more, 'For example {"top_p": 0.9} or {"tools": […]}.'),
    field("play-key", "Key of the gateway", key, "Only if it asks for one. It stays on this page.")));
  options.open = matchMedia("(min-width: 60rem)").matches;
  const node = el("div", {}, el("h1", { tabindex: "-1" }, "Playground"),
    el("div", { class: "play" }, el("section", { class: "card stage" }, el("h2", { class: "unseen" }, "Conversation"), empty, log, problem, form, status), options));
  Object.assign(temperature, { value: state.temperature });
  Object.assign(most, { value: state.most });
  Object.assign(system, { value: state.system });
  Object.assign(more, { value: state.more });
  Object.assign(key, { value: state.key });
  Object.assign(draft, { value: state.draft });
  let names = [];
  let asked = "";
  let running = null;

  const redraw = () => {
    show(empty, !state.turns.length);
    sync(log, state.turns, (each) => each.id, (each) => turn(each.role));
    show(halt, Boolean(running));
    show(send, !running);
    mark(clear, "disabled", Boolean(running) || !state.turns.length);
  };
  const complain = (text) => { show(problem, Boolean(text)); say(problem, text); };

  // Reads the fields; what is wrong with one is said, and nothing is sent.
  function request() {
    const body = { model: state.model, stream: true, stream_options: { include_usage: true } };
    body.messages = [
      ...(state.system.trim() ? [{ role: "system", content: state.system }] : []),
      ...state.turns.filter((each) => each.state !== "failed" && (each.text || each.role === "user")).map((each) => ({ role: each.role, content: each.text })),
    ];
    if (state.temperature !== "") body.temperature = Number(state.temperature);
    if (state.most !== "") body.max_tokens = Number(state.most);
    if (state.more.trim()) {
      let given = null;
      try { given = JSON.parse(state.more); } catch (error) { throw new Trouble(0, { message: `More fields: ${error.message}` }); }
      if (given === null || typeof given !== "object" || Array.isArray(given)) throw new Trouble(0, { message: "More fields: it has to be a JSON object" });
      for (const name of Object.keys(given)) if (OURS.has(name)) throw new Trouble(0, { message: `More fields: ${name} is given by this page` });
      Object.assign(body, given);
    }
    return body;
  }

  async function ask() {
    const text = state.draft.trim();
    if (running || !text) return;
    complain("");
    if (!state.model) { complain("There is no model to ask."); return; }
    const question = { id: crypto.randomUUID(), role: "user", text, thought: "", calls: [], note: "", state: "done" };
    const answer = { id: crypto.randomUUID(), role: "assistant", model: state.model, text: "", thought: "", calls: [], note: "", state: "writing" };
    state.turns.push(question);
    let body = null;
    try { body = request(); } catch (error) { state.turns.pop(); complain(error.message); redraw(); return; }
    state.turns.push(answer);
    state.draft = draft.value = "";
    running = new AbortController();
    redraw();
    log.lastElementChild.scrollIntoView({ block: "nearest" });
    const began = performance.now();
    let first = null;
    let usage = null;
    let finish = "";
    say(status, "The model answers");
    try {
      for await (const chunk of chat(body, state.key, running.signal)) {
        usage = chunk.usage ?? usage;
        const choice = chunk.choices?.[0];
        const delta = choice?.delta ?? {};
        finish = choice?.finish_reason ?? finish;
        const thought = delta.reasoning ?? delta.reasoning_content ?? "";
        const words = delta.content ?? delta.refusal ?? "";
        if (first === null && (thought || words || delta.tool_calls)) first = performance.now();
        answer.thought += thought;
        answer.text += words;
        for (const call of delta.tool_calls ?? []) {
          const kept = (answer.calls[call.index ?? 0] ??= { name: "", arguments: "" });
          kept.name += call.function?.name ?? "";
          kept.arguments += call.function?.arguments ?? "";
        }
        redraw();
        const rest = document.documentElement.scrollHeight - innerHeight - scrollY;
        if (rest < 160) form.scrollIntoView({ block: "end" });
      }
      answer.state = "done";
      const spent = (performance.now() - (first ?? began)) / 1000;
      answer.note = [
        usage ? `${number(usage.completion_tokens)} tokens` : "",
        first === null ? "" : `first after ${seconds((first - began) / 1000)}`,
        usage && spent > 0 && usage.completion_tokens > 1 ? `${number((usage.completion_tokens - 1) / spent)} tokens/s` : "",
        finish ? `ended by ${finish}` : "",
      ].filter((part) => part).join(" · ");
      say(status, "The answer is complete");
    } catch (error) {
      const stopped = error.name === "AbortError";
      answer.state = stopped ? "stopped" : "failed";
      answer.note = stopped ? "stopped" : "";
      if (!stopped) {
        complain([error.message, error.hint].filter((part) => part).join(". "));
        if (!answer.text && !answer.thought) {
          state.turns.splice(-2);
          state.draft = draft.value = text;
        }
      }
      say(status, stopped ? "Stopped" : "The answer failed");
    }
    running = null;
    redraw();
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  draft.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  });
  node.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  halt.addEventListener("click", () => { running?.abort(); draft.focus(); });
  clear.addEventListener("click", () => { state.turns = []; complain(""); redraw(); draft.focus(); });
  key.addEventListener("change", () => { asked = ""; node.update(); });

  node.update = () => {
    const ours = models().flatMap((model) => model.status.endpoints?.modelNames ?? [model.name]);
    const all = [...new Set([...names, ...ours])].sort();
    if (!all.includes(state.model) && all.length && !wanted) state.model = all[0];
    sync(chosen, all, (name) => name, (name) => el("option", { value: name }, name));
    if (all.includes(state.model)) chosen.value = state.model;
    else if (all.length) { state.model = all[0]; chosen.value = all[0]; }
    const now = `${state.key} ${ours.join(" ")} ${world.ping?.router.ready}`;
    if (now !== asked) {
      asked = now; // the router knows further names: aliases
      modelNames(state.key).then((found) => { names = found; }, () => { names = []; });
    }
    redraw();
  };
  node.leave = () => running?.abort();
  return { node, title: "Playground" };
}
