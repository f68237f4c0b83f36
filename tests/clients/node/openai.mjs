// The openai package of Node: prints what it got, by name, as JSON.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { city, model, asked, tools, baseURL, tell } from "./room.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: asked }];

const whole = await client.chat.completions.create({ model, messages });
tell("whole", whole.choices[0].message.content);

let text = "";
const stream = await client.chat.completions.create({ model, messages, stream: true });
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
tell("streamed", text);

const parsed = await client.chat.completions.parse({
  model,
  messages,
  response_format: zodResponseFormat(city, "city"),
});
tell("parsed", parsed.choices[0].message.parsed);

const called = await client.chat.completions
  .stream({ model, messages, tools, tool_choice: "required" })
  .finalChatCompletion();
tell("called", called.choices[0].message.tool_calls[0].function);

const response = await client.responses.create({ model, input: asked });
tell("response", response.output_text);

text = "";
const events = await client.responses.create({ model, input: asked, stream: true });
for await (const event of events) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
tell("response streamed", text);

const filled = await client.responses.parse({
  model,
  input: asked,
  text: { format: zodTextFormat(city, "city") },
});
tell("response parsed", filled.output_parsed);

const models = [];
for await (const each of client.models.list()) models.push(each.id);
tell("models", models);
