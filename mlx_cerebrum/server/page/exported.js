// A conversation as one Markdown file: to be read by people, and by this page again. Comments,
// which no reader of Markdown shows, say where each message begins.

import { blocks } from "./blocks.js";
import { newId } from "./dom.js";
import { newMeta } from "./conversation.js";

const FIRST = /^<!-- (cerebrum\d*)-conversation 1 -->$/;
const LONGEST_NAME = 200;

/** The file's text. */
export function asMarkdown(conversation) {
  const { meta } = conversation;
  const shown = conversation.rows.flatMap((row) => {
    return row.map((node, lane) => ({ node, lane: row.length > 1 ? lane : null }));
  }).filter(({ node }) => node);
  const mark = freeMark([meta.system, ...shown.map(({ node }) => node.content)]);
  const parts = [`<!-- ${mark}-conversation 1 -->\n# ${oneLine(meta.title) || "Conversation"}`];
  const add = (head, title, text) => {
    const open = fenceLeftOpen(text);
    const closed = open ? ` closed ${open}` : "";
    const end = open ? `\n${open}` : "";
    parts.push(`<!-- ${mark} ${head}${closed} -->\n## ${title}\n\n${text}${end}`);
  };
  if (meta.system.trim()) add("system", "System text", meta.system);
  for (const { node, lane } of shown) {
    const column = lane === null ? "" : ` column ${lane + 1}`;
    if (node.role === "user") add(`question${column}`, "Question", node.content);
    else {
      const by = oneLine(node.model ?? "").replaceAll("--", "- -").slice(0, LONGEST_NAME);
      const named = by ? ` by ${by}` : "";
      add(`answer${column}${named}`, `Answer${named}`, node.content);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

function oneLine(text) {
  return text.replace(/\s+/g, " ").trim();
}

/** A word for the comments that no message has. */
function freeMark(texts) {
  for (let number = 1; ; number += 1) {
    const mark = `cerebrum${number === 1 ? "" : number}`;
    if (!texts.some((text) => text.includes(`<!-- ${mark} `))) return mark;
  }
}

/** The fence that an answer left open: all that comes after it would be code. */
function fenceLeftOpen(text) {
  const last = blocks(text.split("\n"), 0).at(-1);
  if (last?.type !== "fence" || last.closed) return "";
  return /^ *(`{3,}|~{3,})/.exec(text.split("\n")[last.line])?.[1] ?? "";
}

/** Is a text such a file? */
export function isOurs(text) {
  return FIRST.test(text.split("\n", 1)[0].trimEnd());
}

/** The conversation of such a file, as a pair of meta and nodes. Throws an Error with one line. */
export function fromMarkdown(text) {
  const whole = text.replace(/\r\n?/g, "\n");
  const mark = FIRST.exec(whole.split("\n", 1)[0].trimEnd())[1];
  const title = /^# (.*)$/m.exec(whole.slice(0, 1000))?.[1].trim() ?? "";
  const meta = newMeta();
  const nodes = [];
  const leaves = [null, null];
  const pieces = whole.replace(/\n$/, "").split(new RegExp(`(?:^|\\n\\n)<!-- ${mark} (.*) -->\\n`));
  for (let at = 1; at < pieces.length; at += 2) {
    const head = /^(system|question|answer)(?: column ([12]))?(?: by (.*?))?(?: closed ([`~]{3,}))?$/;
    const found = head.exec(pieces[at]);
    if (!found) throw new Error("its comments were changed");
    const [, kind, column, model, fence] = found;
    let content = pieces[at + 1].replace(/^## .*\n\n?/, "");
    if (fence && content.endsWith(`\n${fence}`)) content = content.slice(0, -fence.length - 1);
    if (kind === "system") {
      meta.system = content;
      continue;
    }
    meta.comparing ||= Boolean(column);
    const role = kind === "question" ? "user" : "assistant";
    const lanes = column ? [Number(column) - 1] : [0, 1];
    // Where both columns are asked the same, each has the question in its own history.
    for (const parent of new Set(lanes.map((lane) => leaves[lane]))) {
      const before = nodes.find(({ id }) => id === parent)?.role;
      if (before === role || (!before && role === "assistant")) {
        throw new Error("questions and answers are not in turn");
      }
      const at = meta.created + nodes.length;
      const node = { id: newId(), conversation: meta.id, parent, role, content, at, state: "done" };
      if (role === "assistant" && model) node.model = model.slice(0, LONGEST_NAME);
      if (role === "assistant" && column) node.lane = lanes[0];
      nodes.push(node);
      const own = lanes.filter((lane) => leaves[lane] === parent);
      for (const lane of own) leaves[lane] = node.id;
    }
  }
  if (!nodes.length) throw new Error("it holds no messages");
  const names = [0, 1].map((lane) => nodes.find((node) => node.lane === lane)?.model ?? null);
  Object.assign(meta, { title, named: true, leaf: leaves[0], lanes: leaves, models: names });
  return { meta, nodes };
}
