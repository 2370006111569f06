// Scenarios of the client packages for Node. `node scenarios.mjs NAME...` runs those named, one after another, and
// prints a line of JSON for each: {"name", "ok", "error"}. Some print {"said"} lines while they run, for the test that
// watches them from outside. QUIRE_URL is the server's base URL, with /v1; its models are those of server.py.

import assert from "node:assert/strict";

import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool, APICallError } from "ai";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const URL = process.env.QUIRE_URL;
const ENDLESS = JSON.parse(process.env.QUIRE_ENDLESS ?? "{}");
const LENGTHY = process.env.QUIRE_LENGTHY;
const WORDS = "naïve 你好 🦊🙂 — done";
const SAY = [{ role: "user", content: "Say it" }];
const CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz", "days": 2}}\n</tool_call>';
const WEATHER = {
  type: "object",
  properties: { city: { type: "string" }, days: { type: "integer" } },
  required: ["city"],
};
const TOOL = { type: "function", function: { name: "weather", parameters: WEATHER } };
const Verdict = z.object({ kind: z.enum(["question", "order", "greeting"]), polite: z.boolean() });

const openai = new OpenAI({ baseURL: URL, apiKey: "none", maxRetries: 0, timeout: 20_000 });
const anthropic = new Anthropic({ baseURL: URL.replace(/\/v1$/, ""), apiKey: "none", maxRetries: 0 });

/** What `parrot`, which says again what was said last, answers with this text. */
function saying(text) {
  return [{ role: "user", content: text }];
}

/** A provider of the AI SDK whose requests have these fields besides its own. */
function vercel(fields = {}) {
  return createOpenAICompatible({
    name: "quire",
    baseURL: URL,
    includeUsage: true,
    supportsStructuredOutputs: true,
    transformRequestBody: (body) => ({ ...body, ...fields }),
  });
}

/** The same for what speaks the Responses API. */
function vercelResponses(fields = {}) {
  const adding = (url, init) => fetch(url, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), ...fields }) });
  return createOpenAI({ baseURL: URL, apiKey: "none", fetch: adding });
}

function say(said) {
  process.stdout.write(JSON.stringify({ said }) + "\n");
}

async function gathered(stream) {
  let text = "";
  let usage = null;
  const finishes = [];
  for await (const chunk of stream) {
    usage = chunk.usage ?? usage;
    for (const choice of chunk.choices) {
      text += choice.delta.content ?? "";
      if (choice.finish_reason) finishes.push(choice.finish_reason);
    }
  }
  return { text, usage, finishes };
}

/** What is left of a stream once its engine is dead: the error that the client throws. */
async function fateOf(next) {
  try {
    await next();
  } catch (error) {
    return error;
  }
  throw new Error("the stream ended as if it was whole");
}

const scenarios = {
  async "openai: chat, whole and as a stream"() {
    const asked = { model: "tiny", messages: SAY, temperature: 0, max_tokens: 24 };
    const whole = await openai.chat.completions.create(asked);
    const usage = { include_usage: true };
    const stream = await openai.chat.completions.create({ ...asked, stream: true, stream_options: usage });
    const streamed = await gathered(stream);
    assert.equal(streamed.text, whole.choices[0].message.content);
    assert.deepEqual(streamed.finishes, [whole.choices[0].finish_reason]);
    assert.equal(streamed.usage.completion_tokens, whole.usage.completion_tokens);
    assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  },

  async "openai: the stream helper"() {
    const stream = openai.chat.completions.stream({ model: "parrot", messages: SAY, script: WORDS });
    const pieces = [];
    stream.on("content", (delta) => pieces.push(delta));
    assert.equal((await stream.finalChatCompletion()).choices[0].message.content, WORDS);
    assert.equal(pieces.join(""), WORDS);
    assert.ok(pieces.length > 3);
  },

  async "openai: completions"() {
    const asked = { model: "parrot", prompt: WORDS, max_tokens: 50 };
    assert.equal((await openai.completions.create(asked)).choices[0].text, WORDS);
    let text = "";
    for await (const chunk of await openai.completions.create({ ...asked, stream: true })) {
      text += chunk.choices[0].text;
    }
    assert.equal(text, WORDS);
  },

  async "openai: embeddings"() {
    const asked = { model: "tiny", input: ["one text", "and another"] };
    const packed = await openai.embeddings.create(asked); // the client asks for base64 and unpacks it
    const plain = await openai.embeddings.create({ ...asked, encoding_format: "float" });
    packed.data.forEach((one, index) => {
      const other = plain.data[index].embedding;
      assert.equal(one.embedding.length, other.length);
      one.embedding.forEach((value, place) => assert.ok(Math.abs(value - other[place]) < 1e-6));
    });
  },

  async "openai: models"() {
    const names = [];
    for await (const model of openai.models.list()) names.push(model.id);
    assert.ok(names.includes("tiny") && names.includes("parrot"));
    assert.equal((await openai.models.retrieve("parrot")).id, "parrot");
  },

  async "openai: structured output"() {
    const answer = await openai.chat.completions.parse({
      model: "tiny",
      messages: SAY,
      temperature: 0,
      max_tokens: 100,
      reasoning_effort: "none",
      response_format: zodResponseFormat(Verdict, "verdict"),
    });
    Verdict.parse(answer.choices[0].message.parsed);
  },

  async "openai: errors"() {
    const ask = (fields) => openai.chat.completions.create({ model: "tiny", messages: SAY, ...fields });
    const bad = await fateOf(() => ask({ temperature: 9 }));
    assert.ok(bad instanceof OpenAI.BadRequestError);
    assert.deepEqual([bad.status, bad.param, bad.type], [400, "temperature", "invalid_request_error"]);
    assert.ok(bad.requestID);
    const lost = await fateOf(() => ask({ model: "third" }));
    assert.ok(lost instanceof OpenAI.NotFoundError);
    assert.equal(lost.code, "model_not_found");
    const nowhere = new OpenAI({ baseURL: "http://127.0.0.1:9/v1", apiKey: "none", maxRetries: 0 });
    assert.ok((await fateOf(() => nowhere.models.list())) instanceof OpenAI.APIConnectionError);
  },

  async "openai: a crowd is a rate limit, and its headers are obeyed"() {
    const crowd = { model: "parrot", messages: SAY, n: 8, stream: true, ...ENDLESS };
    const leaving = await openai.chat.completions.create(crowd);
    await leaving[Symbol.asyncIterator]().next();
    const asked = { model: "parrot", messages: SAY, script: "at last" };
    const refused = await fateOf(() => openai.chat.completions.create(asked));
    assert.ok(refused instanceof OpenAI.RateLimitError);
    assert.equal(refused.code, "queue_full");
    const wait = Number(refused.headers.get("retry-after-ms"));
    setTimeout(() => leaving.controller.abort(), 200);
    const begun = performance.now();
    const answer = await openai.chat.completions.create(asked, { maxRetries: 5 });
    assert.equal(answer.choices[0].message.content, "at last");
    assert.ok(performance.now() - begun >= wait * 0.99, "it comes back when it was told to");
  },

  async "openai: aborting a stream"() {
    const stream = await openai.chat.completions.create({ model: "parrot", messages: SAY, stream: true, ...ENDLESS });
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) break;
    }
    stream.controller.abort();
    say("aborted");
    await new Promise((resolve) => process.stdin.once("data", resolve)); // the connection must not end with us
  },

  async "ai: aborting a stream"() {
    const controller = new AbortController();
    const { textStream } = streamText({
      model: vercel({ ...ENDLESS }).chatModel("parrot"),
      messages: SAY,
      abortSignal: controller.signal,
      onError: () => {},
    });
    for await (const piece of textStream) {
      if (piece) break;
    }
    controller.abort();
    say("aborted");
    await new Promise((resolve) => process.stdin.once("data", resolve));
  },

  async "deaths: openai and ai"() {
    const streams = [
      (async () => {
        const stream = await openai.chat.completions.create({
          model: "doomed", messages: SAY, stream: true, ...ENDLESS,
        });
        const error = await fateOf(async () => {
          let begun = false;
          for await (const chunk of stream) {
            if (!begun && chunk.choices[0].delta.content) {
              begun = true;
              say("begun");
            }
          }
        });
        assert.ok(error instanceof OpenAI.APIError, `${error}`);
        assert.equal(error.code, "engine_died");
      })(),
      (async () => {
        const failures = [];
        const { fullStream } = streamText({
          model: vercel({ ...ENDLESS }).chatModel("doomed"),
          messages: SAY,
          maxRetries: 0,
          onError: ({ error }) => failures.push(error),
        });
        const cut = await fateOf(async () => {
          let begun = false;
          for await (const part of fullStream) {
            if (!begun && part.type === "text-delta" && part.text) {
              begun = true;
              say("begun");
            }
            assert.notEqual(part.type, "finish");
          }
        });
        assert.equal(failures.length, 1, "the error event is told");
        assert.equal(failures[0].code, "engine_died");
        assert.ok(APICallError.isInstance(cut), `${cut}`); // and then the connection is cut
      })(),
    ];
    await Promise.all(streams);
  },

  async "ai: generateText and streamText"() {
    const model = vercel({ script: WORDS }).chatModel("parrot");
    const whole = await generateText({ model, messages: SAY });
    assert.equal(whole.text, WORDS);
    assert.equal(whole.finishReason, "stop");
    assert.ok(whole.usage.inputTokens > 0 && whole.usage.outputTokens > 0);
    const streamed = streamText({ model, messages: SAY });
    const pieces = [];
    for await (const piece of streamed.textStream) pieces.push(piece);
    assert.equal(pieces.join(""), WORDS);
    assert.ok(pieces.length > 3);
    assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);
  },

  async "ai: structured output"() {
    const { output } = await generateText({
      model: vercel({ reasoning_effort: "none" }).chatModel("tiny"),
      messages: SAY,
      temperature: 0,
      maxOutputTokens: 100,
      output: Output.object({ schema: Verdict }),
    });
    Verdict.parse(output);
  },

  async "ai: embedMany and errors"() {
    const { embeddings } = await embedMany({ model: vercel().embeddingModel("tiny"), values: ["a", "b"] });
    assert.equal(embeddings.length, 2);
    const model = vercel().chatModel("third");
    const error = await fateOf(() => generateText({ model, messages: SAY, maxRetries: 0 }));
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 404);
    assert.match(error.message, /third/);
  },

  async "openai: tools, whole and as a stream"() {
    const asked = { model: "parrot", messages: SAY, tools: [TOOL], script: CALL };
    const whole = await openai.chat.completions.create(asked);
    const [call] = whole.choices[0].message.tool_calls;
    assert.equal(whole.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "weather");
    assert.deepEqual(JSON.parse(call.function.arguments), { city: "Graz", days: 2 });
    const stream = openai.chat.completions.stream(asked);
    const [streamed] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
    assert.deepEqual(JSON.parse(streamed.function.arguments), { city: "Graz", days: 2 });
    const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
    const messages = [...SAY, whole.choices[0].message, result];
    const last = await openai.chat.completions.create({ ...asked, messages, script: "It is sunny." });
    assert.equal(last.choices[0].message.content, "It is sunny.");
  },

  async "openai: responses"() {
    const made = await openai.responses.create({ model: "parrot", input: "Say it", script: WORDS });
    assert.equal(made.output_text, WORDS);
    assert.equal(made.status, "completed");
    const kinds = [];
    const stream = await openai.responses.create({ model: "parrot", input: "Say it", script: WORDS, stream: true });
    let text = "";
    for await (const event of stream) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, WORDS);
    assert.equal(kinds[0], "response.created");
    assert.equal(kinds.at(-1), "response.completed");
    assert.equal((await openai.responses.retrieve(made.id)).output_text, WORDS);
    const more = { model: "parrot", input: "And then?", previous_response_id: made.id, script: "Nothing." };
    assert.equal((await openai.responses.create(more)).output_text, "Nothing.");
    const include = ["message.output_text.logprobs", "reasoning.encrypted_content"];
    assert.equal((await openai.responses.retrieve(made.id, { include })).output_text, WORDS);
    const items = [];
    for await (const item of openai.responses.inputItems.list(made.id, { include })) items.push(item.type);
    assert.deepEqual(items, ["message"]);
    await openai.responses.delete(made.id);
    assert.ok((await fateOf(() => openai.responses.retrieve(made.id))) instanceof OpenAI.NotFoundError);
  },

  async "openai: what helpers parsed goes back"() {
    const asked = { model: "tiny", temperature: 0, max_tokens: 100, reasoning_effort: "none", messages: SAY };
    const { message: said } = (
      await openai.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Verdict, "verdict") })
    ).choices[0];
    Verdict.parse(said.parsed);
    const tool = zodFunction({ name: "judge", parameters: Verdict });
    const calling = { tools: [tool], tool_choice: "required", parallel_tool_calls: false };
    const { message: called } = (await openai.chat.completions.parse({ ...asked, ...calling })).choices[0];
    Verdict.parse(called.tool_calls[0].function.parsed_arguments);
    const streamed = await openai.chat.completions.stream(asked).finalChatCompletion();
    const result = { role: "tool", tool_call_id: called.tool_calls[0].id, content: "sunny" };
    const messages = [...SAY, said, ...SAY, streamed.choices[0].message, ...SAY, called, result];
    const answer = await openai.chat.completions.create({ model: "parrot", messages, script: "I see." });
    assert.equal(answer.choices[0].message.content, "I see.");

    const spare = { model: "tiny", temperature: 0, input: "Say it", reasoning: { effort: "none" } };
    const text = { format: zodTextFormat(Verdict, "verdict") };
    const first = await openai.responses.parse({ ...spare, text });
    Verdict.parse(first.output_parsed);
    const { parameters } = tool.function;
    const judge = { type: "function", name: "judge", parameters, strict: true };
    const second = await openai.responses
      .stream({ ...spare, tools: [judge], tool_choice: "required" })
      .finalResponse();
    const call = second.output.find((item) => item.type === "function_call");
    const output = { type: "function_call_output", call_id: call.call_id, output: "sunny" };
    const input = [...first.output, ...second.output, output];
    assert.equal((await openai.responses.create({ model: "parrot", input, script: "I see." })).output_text, "I see.");
  },

  async "ai: responses"() {
    const model = vercelResponses({ script: WORDS }).responses("parrot");
    assert.equal((await generateText({ model, messages: SAY })).text, WORDS);
    const pieces = [];
    for await (const piece of streamText({ model, messages: SAY }).textStream) pieces.push(piece);
    assert.equal(pieces.join(""), WORDS);
  },

  async "ai: tools"() {
    const asked = [];
    const weather = tool({
      description: "The weather",
      inputSchema: z.object({ city: z.string(), days: z.number().optional() }),
      execute: async (given) => {
        asked.push(given);
        return "sunny";
      },
    });
    const calling = vercel({ script: CALL }).chatModel("parrot");
    const once = { messages: SAY, tools: { weather }, stopWhen: stepCountIs(1) };
    const whole = await generateText({ model: calling, ...once });
    assert.equal(whole.finishReason, "tool-calls");
    assert.equal(whole.toolResults[0].output, "sunny");
    const streamed = streamText({ model: calling, ...once });
    const calls = [];
    for await (const part of streamed.fullStream) if (part.type === "tool-call") calls.push(part.input);
    assert.deepEqual(calls, [{ city: "Graz", days: 2 }]);
    assert.deepEqual(asked, [{ city: "Graz", days: 2 }, { city: "Graz", days: 2 }]);
  },

  async "anthropic: messages, whole and as a stream"() {
    const asked = { model: "parrot", max_tokens: 100, messages: saying(WORDS) };
    const whole = await anthropic.messages.create(asked);
    assert.equal(whole.content[0].text, WORDS);
    assert.equal(whole.stop_reason, "end_turn");
    assert.ok(whole.usage.input_tokens > 0 && whole.usage.output_tokens > 0);
    const stream = anthropic.messages.stream(asked);
    const pieces = [];
    stream.on("text", (delta) => pieces.push(delta));
    assert.equal((await stream.finalMessage()).content[0].text, WORDS);
    assert.equal(pieces.join(""), WORDS);
    const counted = await anthropic.messages.countTokens({ model: "parrot", messages: saying(WORDS) });
    assert.equal(counted.input_tokens, whole.usage.input_tokens + whole.usage.cache_read_input_tokens);
  },

  async "anthropic: errors"() {
    const ask = (fields) => anthropic.messages.create({ model: "parrot", max_tokens: 10, messages: SAY, ...fields });
    assert.ok((await fateOf(() => ask({ model: "third" }))) instanceof Anthropic.NotFoundError);
    const bad = await fateOf(() => ask({ temperature: 9 }));
    assert.ok(bad instanceof Anthropic.BadRequestError);
    assert.match(bad.message, /temperature/);
  },

  async "anthropic: tools"() {
    const tools = [{ name: "weather", input_schema: WEATHER }];
    const asked = { model: "parrot", max_tokens: 100, messages: saying(CALL), tools };
    const whole = await anthropic.messages.create(asked);
    const call = whole.content.find((block) => block.type === "tool_use");
    assert.deepEqual([whole.stop_reason, call.name, call.input], ["tool_use", "weather", { city: "Graz", days: 2 }]);
    const streamed = await anthropic.messages.stream(asked).finalMessage();
    assert.deepEqual(streamed.content.find((block) => block.type === "tool_use").input, { city: "Graz", days: 2 });
  },

  async "anthropic: the tool runner"() {
    const cities = [];
    const weather = betaZodTool({
      name: "weather",
      description: "The weather",
      inputSchema: z.object({ city: z.string(), days: z.number().optional() }),
      run: async ({ city }) => {
        cities.push(city);
        return "sunny";
      },
    });
    const asked = { model: "parrot", max_tokens: 100, messages: saying(CALL), tools: [weather] };
    const last = await anthropic.beta.messages.toolRunner(asked).runUntilDone();
    assert.deepEqual(cities, ["Graz"]);
    assert.equal(last.content[0].text, "sunny");
  },

  async "deaths: anthropic"() {
    const stream = anthropic.messages.stream({ model: "doomed", max_tokens: 1000, messages: saying(LENGTHY) });
    stream.once("text", () => say("begun"));
    const error = await fateOf(() => stream.finalMessage());
    assert.ok(error instanceof Anthropic.AnthropicError, `${error}`);
  },
};

const asked = process.argv.slice(2);
if (asked[0] === "--list") {
  process.stdout.write(JSON.stringify(Object.keys(scenarios)) + "\n");
  process.exit(0);
}
for (const name of asked) {
  let error = null;
  const begun = performance.now();
  try {
    await scenarios[name]();
  } catch (thrown) {
    error = thrown?.stack ?? `${thrown}`;
  }
  const seconds = (performance.now() - begun) / 1000;
  process.stdout.write(JSON.stringify({ name, ok: error === null, error, seconds }) + "\n");
}
process.exit(0);
