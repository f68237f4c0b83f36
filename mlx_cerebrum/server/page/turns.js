// A conversation as other programs keep it, as the page can show it: a system text, then questions
// and answers in turn. What is done to it is what tokenizer/fitting.py does for the terminal's chat.

const ROLES = { developer: "system", function: "tool" };
const KNOWN = ["system", "user", "assistant", "tool"];
const PARTS = ["text", "input_text", "output_text"];

/** `{role, content}` in turn; `wrong(index, problem)` makes the error of a message. */
export function inTurns(messages, wrong) {
  const names = new Map(); // of functions, by the id of their call
  const said = messages.map((message, index) => plain(message, names, (it) => wrong(index, it)));
  const systems = said.filter(({ role }) => role === "system");
  const turns = systems.length ? [{ role: "system", content: joined(systems) }] : [];
  for (const turn of said.filter(({ role }) => role !== "system")) {
    const before = turns.at(-1);
    if (before?.role === turn.role) before.content = joined([before, turn]);
    else {
      // An answer that nothing was said before has an empty question.
      if (turn.role === "assistant" && before?.role !== "user") {
        turns.push({ role: "user", content: "" });
      }
      turns.push({ ...turn });
    }
  }
  return turns;
}

function plain(message, names, wrong) {
  if (typeof message !== "object" || message === null || Array.isArray(message)) {
    throw wrong(" must be an object.");
  }
  const role = ROLES[message.role] ?? message.role;
  if (!KNOWN.includes(role)) throw wrong(`: role must be one of ${KNOWN.join(", ")}.`);
  const text = textOf(message.content, role, wrong);
  if (role === "tool") {
    const name = message.name || names.get(message.tool_call_id);
    return { role: "user", content: `Result${name ? ` of ${name}` : ""}: ${text}` };
  }
  const calls = role === "assistant" ? (message.tool_calls ?? []) : [];
  if (!Array.isArray(calls) || !calls.every((call) => typeof call?.function?.name === "string")) {
    throw wrong(": tool_calls must name their functions.");
  }
  const lines = calls.map((call) => {
    names.set(call.id, call.function.name);
    const { name, arguments: given } = call.function;
    return spaced({ name, arguments: parsed(given) });
  });
  return { role, content: [text, ...lines].filter(Boolean).join("\n") };
}

function textOf(content, role, wrong) {
  if (typeof content === "string") return content;
  if ((content === null || content === undefined) && role === "assistant") return "";
  const parts = Array.isArray(content) ? content : [null];
  if (!parts.every((part) => PARTS.includes(part?.type) && typeof part.text === "string")) {
    throw wrong(": content must be text, or text parts.");
  }
  return parts.map(({ text }) => text).join("");
}

function joined(turns) {
  return turns
    .map(({ content }) => content)
    .filter(Boolean)
    .join("\n\n");
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** JSON in one line, with a blank after commas and colons, as Python writes it. */
function spaced(value) {
  const lines = JSON.stringify(value, null, 1); // in a string every line's end is escaped
  return lines.replace(/(?<=[[{])\n */g, "").replace(/\n *(?=[\]}])/g, "").replace(/\n */g, " ");
}
