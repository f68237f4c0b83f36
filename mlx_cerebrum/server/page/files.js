// Conversations as files: one as the list of messages that `generate --messages` reads, or all
// of them, with every version, as a backup. What a file holds is checked before anything is kept.

import { newId } from "./dom.js";
import { newMeta, titleOf } from "./conversation.js";
import { asMarkdown, fromMarkdown, isOurs } from "./exported.js";
import { inTurns } from "./turns.js";

const FORMAT = "mlx-cerebrum-conversations";
const STATES = ["done", "stopped", "failed", "partial"];
const LARGEST = 50_000_000; // bytes of a file
const MOST = 10_000; // messages of a conversation; more of them, or longer ones, stop the page
const LONGEST = 1_000_000; // characters of a message

/** What is wrong with a file, in one line. */
export class FileError extends Error {}

export function messagesFile(conversation) {
  const messages = conversation.messages(conversation.leaf);
  return { name: `${fileName(conversation.meta.title)}.json`, text: json(messages) };
}

export function markdownFile(conversation) {
  const name = `${fileName(conversation.meta.title)}.md`;
  return { name, text: asMarkdown(conversation), type: "text/markdown" };
}

/** `conversations`: pairs of meta and nodes. */
export function backupFile(conversations) {
  const day = new Date().toISOString().slice(0, 10);
  const all = conversations.map(({ meta, nodes }) => ({ ...meta, nodes }));
  const text = json({ format: FORMAT, version: 1, conversations: all });
  return { name: `cerebrum-conversations-${day}.json`, text };
}

function json(value) {
  return `${JSON.stringify(value, null, 2)}\n`;
}

function fileName(title) {
  const plain = title.normalize("NFKD").replace(/[^\w\s-]/g, "");
  return plain.trim().replace(/\s+/g, "-").slice(0, 40).toLowerCase() || "conversation";
}

export function download({ name, text, type = "application/json" }) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** The conversations of a file as pairs of meta and nodes. Raises FileError. */
export async function readFile(file) {
  const { name } = file;
  if (file.size > LARGEST) throw new FileError(`${name} is larger than ${LARGEST / 1e6} MB.`);
  let text;
  try {
    text = await file.text();
  } catch {
    throw new FileError(`${name} can't be read.`);
  }
  if (isOurs(text)) return [fromPage(text, name)];
  if (/\.(?:md|markdown)$/i.test(name)) {
    throw new FileError(`${name} is no conversation that this page has exported.`);
  }
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new FileError(`${name} is not valid JSON.`);
  }
  if (Array.isArray(value)) return [fromMessages(value, name)];
  if (value?.format !== FORMAT) {
    throw new FileError(`${name} holds neither a list of messages nor a backup of this page.`);
  }
  if (value.version !== 1) {
    throw new FileError(`${name} was written by another version of this page.`);
  }
  if (!Array.isArray(value.conversations)) {
    throw new FileError(`${name}: conversations must be a list.`);
  }
  const where = (index) => `${name}: conversations[${index}]`;
  return value.conversations.map((one, index) => fromBackup(one, where(index)));
}

function fromPage(text, name) {
  let found;
  try {
    found = fromMarkdown(text);
  } catch (error) {
    throw new FileError(`${name} can't be read: ${error.message}.`);
  }
  checkCount(found.nodes, name);
  found.nodes.forEach((node, index) => checkLength(node, `${name}: turn ${index + 1}`));
  found.meta.title = found.meta.title.slice(0, 200);
  return found;
}

function fromMessages(messages, name) {
  if (!messages.length) throw new FileError(`${name} holds no messages.`);
  checkCount(messages, name);
  const turns = inTurns(messages, (index, problem) => {
    return new FileError(`${name}: messages[${index}]${problem}`);
  });
  turns.forEach((turn, index) => checkLength(turn, `${name}: turn ${index + 1}`));
  const meta = newMeta(turns[0].role === "system" ? turns[0].content : "");
  const nodes = [];
  for (const { role, content } of turns) {
    if (role === "system") continue;
    const parent = nodes.at(-1)?.id ?? null;
    const at = meta.created + nodes.length;
    nodes.push({ id: newId(), conversation: meta.id, parent, role, content, at, state: "done" });
  }
  const first = nodes.find((node) => node.role === "user");
  meta.title = titleOf(first?.content ?? "") || name.replace(/\.json$/i, "");
  meta.leaf = nodes.at(-1)?.id ?? null;
  meta.named = true; // kept even where it is only a system text
  return { meta, nodes };
}

function fromBackup(one, where) {
  if (!isObject(one) || !isId(one.id) || !Array.isArray(one.nodes)) {
    throw new FileError(`${where} must have an id and nodes.`);
  }
  checkCount(one.nodes, where);
  const known = new Set();
  const nodes = one.nodes.map((node, index) => {
    const at = `${where}: nodes[${index}]`;
    if (!isObject(node) || !isId(node.id) || known.has(node.id)) {
      throw new FileError(`${at} must have an id of its own.`);
    }
    if (!["user", "assistant"].includes(node.role) || typeof node.content !== "string") {
      throw new FileError(`${at} must have a role, user or assistant, and content, a string.`);
    }
    checkLength(node, at);
    known.add(node.id);
    return { ...cleanNode(node), conversation: one.id };
  });
  for (const [index, node] of nodes.entries()) {
    if (node.parent !== null && !known.has(node.parent)) {
      throw new FileError(`${where}: nodes[${index}] answers a message that is not there.`);
    }
  }
  if (hasCycle(nodes)) throw new FileError(`${where}: its messages answer each other in a circle.`);
  return { meta: cleanMeta(one), nodes };
}

function checkCount(messages, where) {
  if (messages.length <= MOST) return;
  throw new FileError(`${where} holds more than ${MOST.toLocaleString("en")} messages.`);
}

function checkLength({ content }, where) {
  if (content.length <= LONGEST) return;
  throw new FileError(`${where} is longer than ${LONGEST.toLocaleString("en")} characters.`);
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isId(value) {
  return typeof value === "string" && /^\w{1,64}$/.test(value);
}

function hasCycle(nodes) {
  const parents = new Map(nodes.map((node) => [node.id, node.parent]));
  const free = new Set([null]); // ids that lead to a beginning
  for (const { id } of nodes) {
    const trail = new Set();
    for (let now = id; !free.has(now); now = parents.get(now)) {
      if (trail.has(now)) return true;
      trail.add(now);
    }
    for (const seen of trail) free.add(seen);
  }
  return false;
}

const text = (value, other = "") => (typeof value === "string" ? value : other);
const time = (value, now) => (Number.isFinite(value) ? Math.min(value, now) : now);
const orNull = (value) => (typeof value === "string" ? value : null);
const two = (value) => [orNull(value?.[0]), orNull(value?.[1])];

function cleanMeta(one) {
  const now = Date.now();
  return {
    id: one.id,
    title: text(one.title).slice(0, 200),
    named: one.named === true,
    created: time(one.created, now),
    updated: time(one.updated, now),
    system: text(one.system),
    leaf: orNull(one.leaf),
    comparing: one.comparing === true,
    models: two(one.models),
    lanes: two(one.lanes),
    deleted: null,
  };
}

function cleanNode(node) {
  const { id, role, content, error } = node;
  const at = time(node.at, Date.now());
  const clean = { id, role, content, parent: orNull(node.parent), at };
  clean.state = STATES.includes(node.state) ? node.state : "done";
  if (["stop", "length"].includes(node.finish)) clean.finish = node.finish;
  if (typeof node.model === "string") clean.model = node.model.slice(0, 200);
  if (node.lane === 0 || node.lane === 1) clean.lane = node.lane;
  if (typeof error === "string") clean.error = error.slice(0, 500);
  if (isObject(node.stats)) {
    const good = ([, value]) => typeof value === "number" && value >= 0 && value < 1e12;
    clean.stats = Object.fromEntries(Object.entries(node.stats).filter(good));
  }
  return clean;
}
