// Talk to a server by the quick start of one npm client, and print as JSON what came back.
//
// node node_program.mjs FOLDER NAME URL MODEL THINKER, where FOLDER holds node_modules.

import { createRequire } from "node:module";
import { join } from "node:path";

const [FOLDER, NAME, URL_, MODEL, THINKER] = process.argv.slice(2);
const require = createRequire(join(FOLDER, "program.js"));
// A small model that must call goes on calling: a reply has room for as many calls as there may be.
const ASK = [{ role: "user", content: "Hello" }];
const CITIES = ["Paris", "Rome"];
const SCHEMA = {
  type: "object",
  properties: { city: { type: "string", enum: CITIES } },
  required: ["city"],
  additionalProperties: false,
};

async function openai() {
  const { default: OpenAI, NotFoundError } = require("openai");
  const { zodResponseFormat, zodTextFormat, zodFunction } = require("openai/helpers/zod");
  const { z } = require("zod");
  const client = new OpenAI({ baseURL: `${URL_}/v1`, apiKey: "x", maxRetries: 0 });
  const City = z.object({ city: z.enum(CITIES) });
  const options = { model: MODEL, max_completion_tokens: 600 };
  const chat = await client.chat.completions.create({ ...options, messages: ASK, max_completion_tokens: 8 });
  let streamed = "", usage = null;
  const stream = await client.chat.completions.create({
    ...options, messages: ASK, max_completion_tokens: 8, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    streamed += chunk.choices[0]?.delta?.content || "";
    usage = chunk.usage || usage;
  }
  const parsed = await client.chat.completions.parse({
    ...options, messages: ASK, response_format: zodResponseFormat(City, "city"),
  });
  const tools = [{ type: "function", function: { name: "weather", parameters: SCHEMA, strict: true } }];
  const called = await client.chat.completions.create({
    ...options, messages: ASK, tools, tool_choice: "required", parallel_tool_calls: false,
  });
  const runner = client.chat.completions.stream({ ...options, messages: ASK, tools, tool_choice: "required" });
  const final = await runner.finalChatCompletion();
  let ran = 0;
  const runs = client.chat.completions.runTools({
    ...options, messages: ASK, max_completion_tokens: 200,
    tool_choice: { type: "function", function: { name: "weather" } },
    tools: [zodFunction({ name: "weather", parameters: City, function: () => { ran += 1; return "sunny"; } })],
  }, { maxChatCompletions: 2 });
  await runs.done();
  const first = await client.responses.create({ model: MODEL, input: "Hello", max_output_tokens: 8 });
  const second = await client.responses.create({
    model: MODEL, input: "And?", previous_response_id: first.id, max_output_tokens: 8,
  });
  const inputs = [];
  for await (const item of client.responses.inputItems.list(second.id, { limit: 2 })) inputs.push(item.type);
  const form = await client.responses.parse({
    model: MODEL, input: "Where?", max_output_tokens: 600, text: { format: zodTextFormat(City, "city") },
  });
  const kinds = [];
  const events = client.responses.stream({
    model: MODEL, input: "Weather?", tools: [{ type: "function", name: "weather", parameters: SCHEMA, strict: true }],
    tool_choice: "required", max_output_tokens: 600,
  });
  for await (const event of events) kinds.push(event.type);
  const response = await events.finalResponse();
  const thought = await client.chat.completions.create({ model: THINKER, messages: ASK, max_completion_tokens: 8 });
  const text = await client.completions.create({ model: MODEL, prompt: "Hello", max_tokens: 8 });
  let missing = "";
  try {
    await client.chat.completions.create({ model: "nope", messages: ASK });
  } catch (error) {
    missing = error instanceof NotFoundError ? error.code : String(error);
  }
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  return {
    text: chat.choices[0].message.content,
    streamed, usage: usage.completion_tokens,
    parsed: parsed.choices[0].message.parsed.city,
    called: JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city,
    "streamed call": JSON.parse(final.choices[0].message.tool_calls[0].function.arguments).city,
    ran: ran >= 1,
    longer: second.usage.input_tokens > first.usage.input_tokens,
    inputs: inputs.length, form: form.output_parsed.city,
    "first and last": [kinds[0], kinds.at(-1)],
    "called in a response": JSON.parse(response.output.at(-1).arguments).city,
    thought: Boolean(thought.choices[0].message.reasoning_content),
    completion: text.choices[0].text,
    missing, models: models.includes(MODEL),
  };
}

async function ai_sdk(provider, model, thinker) {
  const { generateText, streamText, generateObject, streamObject, tool, jsonSchema, Output, stepCountIs } = require("ai");
  const { z } = require("zod");
  const City = z.object({ city: z.enum(CITIES) });
  const options = { model, maxRetries: 0, maxOutputTokens: 600 };
  const text = await generateText({ ...options, prompt: "Hello", maxOutputTokens: 8, temperature: 0 });
  const stream = streamText({ ...options, messages: ASK, system: "Be brief.", maxOutputTokens: 8 });
  let streamed = "";
  for await (const part of stream.textStream) streamed += part;
  const usage = await stream.usage;
  const object = await generateObject({ ...options, schema: City, prompt: "Where?" });
  // The names of a record are free: this model may write one to its limit, which is no refusal.
  let recorded = "";
  try {
    const more = z.record(z.string(), z.enum(["a"])).optional();
    recorded = (await generateObject({ ...options, prompt: "Where?", schema: z.object({ city: z.enum(CITIES), more }) })).object.city;
  } catch (error) {
    if (error.finishReason !== "length") throw error;
    recorded = "cut off";
  }
  const parts = streamObject({ ...options, schema: City, prompt: "Where?" });
  for await (const _ of parts.partialObjectStream);
  const chosen = await generateObject({ ...options, output: "enum", enum: CITIES, prompt: "Where?", temperature: 0 });
  const output = await generateText({ ...options, prompt: "Where?", output: Output.object({ schema: City }) });
  let ran = 0;
  const weather = tool({
    description: "The weather.", inputSchema: City,
    execute: async ({ city }) => { ran += 1; return { city, sky: "clear" }; },
  });
  const required = await generateText({
    ...options, prompt: "Weather?", tools: { weather }, toolChoice: "required", stopWhen: stepCountIs(2),
  });
  const named = streamText({
    ...options, prompt: "Weather?", stopWhen: stepCountIs(1),
    tools: { weather: tool({ inputSchema: jsonSchema(SCHEMA) }) }, toolChoice: { type: "tool", toolName: "weather" },
  });
  const kinds = [];
  for await (const part of named.fullStream) {
    if (part.type === "error") throw part.error;
    kinds.push(part.type);
  }
  const auto = await generateText({ ...options, maxOutputTokens: 8, prompt: "Weather?", tools: { weather } });
  const turns = [...ASK];
  for (let i = 0; i < 2; i++) {
    const turn = streamText({ ...options, messages: turns, maxOutputTokens: 8 });
    for await (const part of turn.fullStream) if (part.type === "error") throw part.error;
    turns.push(...(await turn.response).messages, { role: "user", content: "And?" });
  }
  const thought = thinker && await generateText({ ...options, model: thinker, prompt: "Hello", maxOutputTokens: 8 });
  return {
    text: text.text, streamed, usage: usage.outputTokens, finish: text.finishReason,
    object: object.object.city, recorded, parts: (await parts.object).city,
    chosen: chosen.object, output: output.output.city,
    required: required.steps[0].toolCalls[0].input.city, ran, steps: required.steps.length,
    named: (await named.toolCalls)[0].input.city, kinds: [...new Set(kinds)],
    auto: auto.finishReason, turns: turns.length, thought: thinker ? Boolean(thought.reasoningText) : null,
  };
}

async function ai_openai() {
  const { createOpenAI } = require("@ai-sdk/openai");
  const made = createOpenAI({ baseURL: `${URL_}/v1`, apiKey: "x" });
  const responses = await ai_sdk("openai", made(MODEL));
  const chat = await ai_sdk("openai", made.chat(MODEL));
  const { generateText } = require("ai");
  const completion = await generateText({ model: made.completion(MODEL), prompt: "Hello", maxOutputTokens: 8, maxRetries: 0 });
  const hints = await generateText({
    model: made(MODEL), prompt: "Hello", maxOutputTokens: 8, maxRetries: 0,
    providerOptions: { openai: { parallelToolCalls: false, store: false, reasoningEffort: "low", user: "me" } },
  });
  return { responses, chat, completion: completion.text, hints: hints.text };
}

async function ai_compatible() {
  const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
  const made = createOpenAICompatible({
    name: "gptq", baseURL: `${URL_}/v1`, apiKey: "x", includeUsage: true, supportsStructuredOutputs: true,
  });
  const plain = createOpenAICompatible({ name: "gptq", baseURL: `${URL_}/v1` });
  const { generateText } = require("ai");
  const completion = await generateText({ model: made.completionModel(MODEL), prompt: "Hello", maxOutputTokens: 8, maxRetries: 0 });
  return {
    strict: await ai_sdk("gptq", made(MODEL), made(THINKER)),
    text: (await generateText({ model: plain(MODEL), prompt: "Hello", maxOutputTokens: 8, maxRetries: 0 })).text,
    completion: completion.text,
  };
}

async function ai_anthropic() {
  const { createAnthropic } = require("@ai-sdk/anthropic");
  const made = createAnthropic({ baseURL: `${URL_}/v1`, apiKey: "x" });
  return ai_sdk("anthropic", made(MODEL), made(THINKER));
}

async function anthropic() {
  const { default: Anthropic, NotFoundError } = require("@anthropic-ai/sdk");
  const client = new Anthropic({ baseURL: URL_, apiKey: "x", maxRetries: 0 });
  const tools = [{ name: "weather", description: "It.", input_schema: SCHEMA }];
  const text = await client.messages.create({ model: MODEL, max_tokens: 8, messages: ASK });
  let streamed = "";
  const stream = client.messages.stream({ model: MODEL, max_tokens: 8, system: "Be brief.", messages: ASK })
    .on("text", (part) => { streamed += part; });
  const whole = await stream.finalMessage();
  const called = await client.messages.create({
    model: MODEL, max_tokens: 600, messages: ASK, tools, tool_choice: { type: "tool", name: "weather" },
  });
  const answered = await client.messages.create({
    model: MODEL, max_tokens: 8, tools,
    messages: [
      ...ASK, { role: "assistant", content: called.content },
      { role: "user", content: [{ type: "tool_result", tool_use_id: called.content.at(-1).id, content: "sunny" }] },
    ],
  });
  const kinds = [];
  for await (const event of await client.messages.create({
    model: MODEL, max_tokens: 600, messages: ASK, tools, tool_choice: { type: "any" }, stream: true,
  })) kinds.push(event.type);
  const count = await client.messages.countTokens({ model: MODEL, messages: ASK });
  const thought = await client.messages.create({
    model: THINKER, max_tokens: 2000, messages: ASK, thinking: { type: "enabled", budget_tokens: 1024 },
  });
  let missing = "";
  try {
    await client.messages.create({ model: "nope", max_tokens: 8, messages: ASK });
  } catch (error) {
    missing = error instanceof NotFoundError ? error.error.error.type : String(error);
  }
  const beta = await client.beta.messages.create({ model: MODEL, max_tokens: 8, messages: ASK, betas: ["token-counting-2024-11-01"] });
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  const { zodOutputFormat } = require("@anthropic-ai/sdk/helpers/zod");
  const { betaZodTool } = require("@anthropic-ai/sdk/helpers/beta/zod");
  const { z } = require("zod");
  const City = z.object({ city: z.enum(CITIES) });
  const formed = await client.messages.parse({
    model: MODEL, max_tokens: 600, messages: ASK, output_config: { format: zodOutputFormat(City) },
  });
  let ran = 0;
  const run = () => { ran += 1; return "sunny"; };
  const last = await client.beta.messages.toolRunner({
    model: MODEL, max_tokens: 600, messages: ASK, max_iterations: 2, tool_choice: { type: "any" },
    tools: [betaZodTool({ name: "weather", description: "It.", inputSchema: City, run })],
  });
  return {
    text: text.content[0].text, stop: text.stop_reason, streamed: streamed === whole.content[0].text && streamed.length > 0,
    called: called.content.at(-1).input.city, answered: answered.content[0].type, kinds: [...new Set(kinds)],
    counted: count.input_tokens === text.usage.input_tokens, thought: thought.content[0].type, missing,
    beta: beta.content[0].type, models: models.includes(MODEL), formed: formed.parsed_output.city,
    ran: ran >= 1, "second turn": last.role,
  };
}

async function ollama() {
  const { Ollama } = require("ollama");
  const client = new Ollama({ host: URL_ });
  const options = { num_predict: 8, num_ctx: 512, temperature: 0 };
  const whole = await client.chat({ model: MODEL, messages: ASK, options });
  let streamed = "";
  for await (const part of await client.chat({ model: MODEL, messages: ASK, options, stream: true })) streamed += part.message.content;
  const formed = await client.chat({ model: MODEL, messages: ASK, format: SCHEMA });
  const tools = [{ type: "function", function: { name: "weather", description: "It.", parameters: SCHEMA } }];
  const called = await client.chat({ model: MODEL, messages: ASK, tools, options });
  const history = await client.chat({
    model: MODEL, tools, options,
    messages: [
      ...ASK,
      { role: "assistant", content: "", tool_calls: [{ function: { name: "weather", arguments: { city: "Paris" } } }] },
      { role: "tool", content: "sunny", tool_name: "weather" },
    ],
  });
  const thought = await client.chat({ model: THINKER, messages: ASK, think: true, options });
  const generated = await client.generate({ model: MODEL, prompt: "Hello", options, keep_alive: "5m" });
  let missing = "";
  try { await client.chat({ model: "nope", messages: ASK }); } catch (error) { missing = error.name; }
  return {
    text: whole.message.content, streamed: streamed === whole.message.content, city: JSON.parse(formed.message.content).city,
    called: typeof called.message.content, history: history.message.role, thought: Boolean(thought.message.thinking),
    completion: generated.response, models: (await client.list()).models.some((it) => it.model === MODEL),
    capabilities: (await client.show({ model: MODEL })).capabilities, running: (await client.ps()).models.length,
    version: Boolean((await client.version()).version), missing,
  };
}

const programs = { openai, ai_openai, ai_compatible, ai_anthropic, anthropic, ollama };
const printed = await programs[NAME]();
console.log(JSON.stringify(printed));
