// The `ai` package with three ways to reach a server like OpenAI's: prints what it got as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { city, model, asked, baseURL, tell } from "./room.mjs";

const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "cerebrum",
  baseURL,
  supportsStructuredOutputs: true,
});
const weather = tool({
  description: "Says how the weather is",
  inputSchema: z.object({ city: z.string().max(8) }),
});

const kinds = { responses: openai(model), chat: openai.chat(model), compatible: compatible(model) };
for (const [kind, of] of Object.entries(kinds)) {
  const settings = { model: of, prompt: asked, maxRetries: 0 };
  tell(`${kind} whole`, (await generateText(settings)).text);

  let text = "";
  for await (const delta of streamText(settings).textStream) text += delta;
  tell(`${kind} streamed`, text);

  tell(`${kind} object`, (await generateObject({ ...settings, schema: city })).object);
  const output = Output.object({ schema: city });
  tell(`${kind} output`, (await generateText({ ...settings, output })).output);

  let last;
  const { partialObjectStream } = streamObject({ ...settings, schema: city });
  for await (const object of partialObjectStream) last = object;
  tell(`${kind} object streamed`, last);

  const forced = { ...settings, tools: { weather }, toolChoice: "required" };
  tell(`${kind} called`, (await generateText(forced)).toolCalls[0]);
}
