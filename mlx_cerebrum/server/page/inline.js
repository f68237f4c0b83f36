// Markdown within a paragraph, as DOM nodes. One pass; time grows with the length of the text,
// whatever the text: every piece is opened once and closed or dropped once.

import { h } from "./dom.js";

const SPECIAL = /[\\`*_~[\]!<&\n]|https?:\/\//g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const ENTITY = /&(?:(amp|lt|gt|quot|apos|nbsp)|#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6}));/y;
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const BARE_URL = /https?:\/\/[^\s<>"`[\]|*]+/y;
const ANGLE_URL = /<((?:https?:|mailto:)[^\s<>]{1,2048})>/y;
const PROTOCOLS = ["http:", "https:", "mailto:"];
const LONGEST_LINK = 1000;
const DEEPEST = 16; // elements within each other; what is deeper is shown without its own

/** The address as the browser understands it, or null where it must not be a link. */
export function safeUrl(text) {
  let url;
  try {
    url = new URL(text);
  } catch {
    return null;
  }
  return PROTOCOLS.includes(url.protocol) ? url.href : null;
}

/** Append the inline Markdown of `source` to an element. */
export function appendInline(into, source) {
  build(into, scan(source));
}

// Pieces: { text }, { code }, { newline }, { link, close } and delimiter runs such as **,
// { char, count, closes, opens }: tags that end before it and begin after it.

function scan(source) {
  const pieces = [];
  const openers = { "*": [], _: [], "~": [] };
  const brackets = [];
  const ticks = backquotes(source);
  const text = (value) => value && pieces.push({ text: value });
  let at = 0;
  SPECIAL.lastIndex = 0;
  for (let match; (match = SPECIAL.exec(source)); SPECIAL.lastIndex = at) {
    const start = match.index;
    const char = source[start];
    text(source.slice(at, start));
    at = start + 1;
    if (char === "\n") {
      pieces.push({ newline: true });
    } else if (char === "\\") {
      const next = source[at] ?? "";
      if (ESCAPABLE.test(next)) at += 1;
      text(ESCAPABLE.test(next) ? next : "\\");
    } else if (char === "`") {
      at = codeSpan(source, start, ticks, pieces);
    } else if (char in openers) {
      while (source[at] === char) at += 1;
      delimiter(source, start, at, pieces, openers);
    } else if (char === "[" || (char === "!" && source[at] === "[")) {
      const image = char === "!";
      if (image) at += 1;
      const piece = { text: image ? "![" : "[", image, index: pieces.length };
      pieces.push(piece);
      brackets.push(piece);
    } else if (char === "]") {
      at = closeBracket(source, at, pieces, brackets, openers);
    } else if (char === "&") {
      ENTITY.lastIndex = start;
      const found = ENTITY.exec(source);
      text(found ? entity(found) : "&");
      if (found) at = ENTITY.lastIndex;
    } else if (char === "<") {
      at = address(source, start, ANGLE_URL, 1, pieces);
    } else if (char === "h" && !/\w/.test(source[start - 1] ?? "")) {
      at = address(source, start, BARE_URL, 0, pieces);
    } else {
      text(char);
    }
  }
  text(source.slice(at));
  return pieces;
}

function entity([, name, decimal, hex]) {
  if (name) return NAMED[name];
  const code = decimal ? parseInt(decimal, 10) : parseInt(hex, 16);
  const good = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
  return good ? String.fromCodePoint(code) : "\ufffd";
}

/** A bare address, or one in angle brackets; else its first character. Returns where it ends. */
function address(source, start, pattern, group, pieces) {
  pattern.lastIndex = start;
  const match = pattern.exec(source);
  let found = match?.[group] ?? "";
  let end = pattern.lastIndex;
  if (match && group === 0) {
    // Punctuation at the end is the sentence's, a closing bracket too if nothing opened it.
    const opened = found.includes("(");
    let length = found.length;
    while (length && ".,;:!?'_~".includes(found[length - 1])) length -= 1;
    if (!opened) while (length && ").,".includes(found[length - 1])) length -= 1;
    found = found.slice(0, length);
    end = start + length;
  }
  const link = found && safeUrl(found);
  if (!link) {
    pieces.push({ text: source[start] });
    return start + 1;
  }
  pieces.push({ link }, { text: found.replace(/^mailto:/, "") }, { close: true });
  return end;
}

/** Where runs of backquotes begin, by their length. */
function backquotes(source) {
  const runs = new Map();
  for (const { 0: run, index } of source.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { starts: [], next: 0 });
    runs.get(run.length).starts.push(index);
  }
  return runs;
}

function codeSpan(source, start, ticks, pieces) {
  let inner = start;
  while (source[inner] === "`") inner += 1;
  const length = inner - start;
  const runs = ticks.get(length);
  while (runs && runs.starts[runs.next] < inner) runs.next += 1;
  const end = runs?.starts[runs.next];
  if (end === undefined) {
    pieces.push({ text: source.slice(start, inner) });
    return inner;
  }
  let code = source.slice(inner, end).replaceAll("\n", " ");
  if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
  pieces.push({ code });
  return end + length;
}

function characterBefore(source, at) {
  const low = source.charCodeAt(at - 1);
  const pair = low >= 0xdc00 && low <= 0xdfff;
  return at > 0 ? source.slice(at - (pair ? 2 : 1), at) : " ";
}

/** CommonMark's rules for which runs can begin and end emphasis. */
function delimiter(source, start, end, pieces, openers) {
  const char = source[start];
  const before = characterBefore(source, start);
  const after = end < source.length ? String.fromCodePoint(source.codePointAt(end)) : " ";
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
  const word = char === "_";
  const run = {
    char,
    count: end - start,
    index: pieces.length,
    closes: [],
    opens: [],
    canOpen: left && (!word || !right || markBefore),
    canClose: right && (!word || !left || markAfter),
  };
  pieces.push(run);
  if (char === "~" && run.count !== 2) return; // ~ alone means "about"
  const stack = openers[char];
  while (run.canClose && run.count && stack.length) {
    const opener = stack.at(-1);
    const both = opener.canClose || run.canOpen;
    if (both && char !== "~" && (opener.count + run.count) % 3 === 0 && run.count % 3) break;
    const used = opener.count >= 2 && run.count >= 2 ? 2 : 1;
    const tag = char === "~" ? "del" : used === 2 ? "strong" : "em";
    opener.opens.push(tag);
    run.closes.push(tag);
    opener.count -= used;
    run.count -= used;
    dropAfter(openers, opener.index); // what was opened between the two was no emphasis
    if (!opener.count) stack.pop();
  }
  if (run.canOpen && run.count) stack.push(run);
}

function dropAfter(openers, index) {
  for (const stack of Object.values(openers)) {
    while (stack.length && stack.at(-1).index > index) stack.pop();
  }
}

/** After a `]`: make a link of it where an address follows. Returns where to go on. */
function closeBracket(source, at, pieces, brackets, openers) {
  const open = brackets.pop();
  const found = open && source[at] === "(" ? destination(source, at) : null;
  const link = found && safeUrl(found.url);
  if (!link) {
    pieces.push({ text: "]" });
    return at;
  }
  dropAfter(openers, open.index);
  pieces[open.index] = { link, image: open.image };
  if (open.image && pieces.length === open.index + 1) pieces.push({ text: found.url });
  pieces.push({ close: true });
  if (!open.image) brackets.length = 0; // no links within links
  return found.end;
}

/** `(address "title")` at `at`: the address, and where it ends. */
function destination(source, at) {
  const limit = Math.min(source.length, at + LONGEST_LINK);
  let end = at + 1;
  const blank = () => {
    while (end < limit && source.charCodeAt(end) <= 32) end += 1;
  };
  blank();
  let url;
  if (source[end] === "<") {
    const from = (end += 1);
    while (end < limit && source[end] !== ">" && source[end] !== "\n") end += 1;
    if (source[end] !== ">") return null;
    url = source.slice(from, end);
    end += 1;
  } else {
    const from = end;
    for (let depth = 0; end < limit && source.charCodeAt(end) > 32; end += 1) {
      if (source[end] === "(") depth += 1;
      else if (source[end] === ")" && --depth < 0) break;
    }
    url = source.slice(from, end);
  }
  blank();
  const quote = source[end];
  if (quote === '"' || quote === "'") {
    end += 1;
    while (end < limit && source[end] !== quote) end += 1;
    end += 1;
    blank();
  }
  return end < limit && source[end] === ")" ? { url, end: end + 1 } : null;
}

function build(into, pieces) {
  const stack = [into];
  let links = 0;
  let waiting = "";
  const flush = () => {
    if (waiting) stack.at(-1).append(waiting);
    waiting = "";
  };
  const open = (make) => {
    flush();
    const deep = stack.length > DEEPEST;
    const element = deep ? stack.at(-1) : make();
    if (!deep) stack.at(-1).append(element);
    stack.push(element);
  };
  const close = () => {
    flush();
    stack.pop();
  };
  for (const piece of pieces) {
    if (piece.link) {
      const inner = links > 0;
      open(() => (inner ? h("span") : anchor(piece)));
      links += 1;
    } else if (piece.close) {
      close();
      links -= 1;
    } else if (piece.char) {
      piece.closes.forEach(close);
      waiting += piece.char.repeat(piece.count);
      for (const tag of piece.opens.reverse()) open(() => h(tag));
    } else if (piece.code !== undefined) {
      flush();
      stack.at(-1).append(h("code", {}, piece.code));
    } else if (piece.newline) {
      waiting = waiting.trimEnd();
      flush();
      stack.at(-1).append(h("br"));
    } else {
      waiting += piece.text;
    }
  }
  flush();
}

function anchor({ link, image }) {
  return h("a", {
    href: link,
    target: "_blank",
    rel: "noopener noreferrer",
    referrerpolicy: "no-referrer",
    class: image ? "image" : null,
    title: link,
  });
}
