// Text files in a question: how they are written into it, found in it again, and read from disk.

import { plural } from "./dom.js";

export const LONGEST = 1_000_000; // characters of a question with its files, as files.js has it
const LARGEST = 4 * LONGEST; // bytes of a file: no character takes more
const MOST = 50; // files of a question
const LONGEST_NAME = 120;
const TRIES = 60; // places of a question that may begin its files

/** A question: what was typed, and then each file of `{ name, text }` as a block of code. */
export function withFiles(text, files) {
  const blocks = files.map(({ name, text: inner }) => {
    const longest = Math.max(2, ...(inner.match(/`+/g) ?? []).map((run) => run.length));
    const fence = "`".repeat(longest + 1);
    const language = /\.(\w{1,12})$/.exec(name)?.[1].toLowerCase() ?? "";
    const end = inner === "" || inner.endsWith("\n") ? "" : "\n";
    return `File “${name}”\n${fence}${language}\n${inner}${end}${fence}`;
  });
  return files.length ? [text.trimEnd(), ...blocks].filter(Boolean).join("\n\n") : text;
}

/** What was typed and the files of a question, as `withFiles` wrote them. */
export function partsOf(content) {
  for (let at = -1, tries = 0; tries < TRIES; tries += 1) {
    at = content.indexOf("File “", at + 1);
    if (at < 0) break;
    if (at > 0 && !content.startsWith("\n\n", at - 2)) continue;
    const files = filesFrom(content, at);
    if (files) return { text: content.slice(0, Math.max(0, at - 2)), files };
  }
  return { text: content, files: [] };
}

/** The files from a place on; null where not all of the rest is files. */
function filesFrom(content, from) {
  const files = [];
  for (let at = from; at < content.length; ) {
    const line = content.slice(at, at + 500);
    const head = /^File “([^”\n]{1,200})”\n(`{3,})[^`\n]*\n/.exec(line);
    if (!head) return null;
    const [, name, fence] = head;
    const begin = at + head[0].length;
    const close = `\n${fence}`;
    let end = content.indexOf(close, begin - 1);
    // The fence is longer than any in the file, so that none of its own lines ends it.
    const ends = (place) => place === content.length || content.startsWith("\n\nFile “", place);
    while (end >= 0 && !ends(end + close.length)) end = content.indexOf(close, end + 1);
    if (end < 0) return null;
    files.push({ name, text: content.slice(begin, end + 1) });
    at = end + close.length;
    if (at < content.length) at += 2;
  }
  return files;
}

/** About how many tokens a text has, by what its letters take in a vocabulary of 32,000. */
export function guess(text) {
  let [other, each] = [0, 0];
  for (let at = 0; at < text.length; at += 1) {
    const code = text.charCodeAt(at);
    if (code >= 0x2e80) each += 1; // Chinese, and halves of pairs
    else if (code >= 0x250) other += 1; // Greek, Russian, Arabic
  }
  return Math.ceil((text.length - other - each) / 4 + other / 2 + each);
}

/** A size in words. */
export function sizeOf(bytes) {
  if (bytes < 1000) return plural(bytes, "byte");
  if (bytes < 1e6) return `${Math.round(bytes / 1000)} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

/** A file as `{ name, text }`; throws an Error with one line for the reader. */
export async function readText(file) {
  const name = file.name.replace(/[”\p{C}]/gu, "").slice(-LONGEST_NAME) || "file";
  const most = `a question holds ${LONGEST.toLocaleString("en")} characters at most`;
  if (file.size > LARGEST) throw new Error(`${name} is too large (${sizeOf(file.size)}): ${most}.`);
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch {
    throw new Error(`${name} can't be read. A folder? Only files can be put into a question.`);
  }
  const text = decoded(bytes);
  if (text === null) throw new Error(`${name} is no text in UTF-8, so it can't be put into a question.`);
  if (text.length > LONGEST) {
    throw new Error(`${name} is too large (${sizeOf(file.size)}): ${most}.`);
  }
  return { name, text };
}

/** The text that bytes are; null where they are none. UTF-16 is known by its first two bytes. */
function decoded(bytes) {
  const first = (bytes[0] << 8) | bytes[1];
  const kind = { 0xfffe: "utf-16le", 0xfeff: "utf-16be" }[first] ?? "utf-8";
  try {
    const text = new TextDecoder(kind, { fatal: true }).decode(bytes);
    return text.includes("\0") ? null : text.replace(/\r\n?/g, "\n");
  } catch {
    return null;
  }
}

/**
 * The files put into a question that is not sent yet. `changed()` is called when they do,
 * `wrong(line)` with what could not be taken, `room()` says how many characters are typed.
 */
export class Attached {
  constructor({ changed, wrong, room }) {
    this.changed = changed;
    this.wrong = wrong;
    this.room = room;
    this.files = [];
  }

  get length() {
    return this.files.reduce((sum, { text }) => sum + text.length, 0);
  }

  /** About how many tokens they are. */
  get tokens() {
    return this.files.reduce((sum, file) => sum + (file.tokens ??= guess(file.text)), 0);
  }

  /** Take what can be taken of some files; the first that can't is told. */
  async add(given) {
    let wrong = null;
    for (const file of given) {
      try {
        const one = await readText(file);
        if (this.files.length === MOST) throw new Error(`A question holds ${MOST} files at most.`);
        if (this.length + one.text.length + this.room() > LONGEST) {
          const most = LONGEST.toLocaleString("en");
          throw new Error(`${one.name} is too much: a question holds ${most} characters at most.`);
        }
        this.files.push(one);
      } catch (error) {
        wrong ??= error.message;
      }
    }
    this.changed();
    if (wrong) this.wrong(wrong);
  }

  remove(file) {
    this.files = this.files.filter((one) => one !== file);
    this.changed();
  }

  set(files) {
    this.files = files;
    this.changed();
  }
}
