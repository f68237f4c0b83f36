// Markdown within a paragraph, as DOM nodes. One pass; time grows with the length of the text,
// whatever the text: every piece is opened once and closed or dropped once.

import { h } from "./dom.js";
import { address, destination, labelOf, safeUrl } from "./links.js";
import { setFormula } from "./maths.js";

const SPECIAL = /[\\`*_~[\]!<&$\n]|https?:\/\//g;
const BREAK = /<br *\/?>/iy;
const FORMULA = /\\[([]|\$\$?|\\begin\{[^{}\n]*\}|\\boxed\{/y;
const FORMULA_END = { "\\(": "\\)", "\\[": "\\]", $$: "$$", $: "$" };
const LONGEST_FORMULA = 4000;
const LONGEST_BOX = 1000;
const MOST_DOLLARS = 20; // within a formula
// A formula without a sign of TeX's, $x$ or $3n + 1$, has no words, and none joins on to it.
const WORDS = /\p{L}{4}|\p{L}{2,}\s+\p{L}{2,}|[,;]\s+\p{L}{2,}/u;
const AFTER = /(?:th|st|nd|rd|s)?(?!\w)/y;
const COMMANDS = /\\[a-zA-Z]+(?:\{[^{}]*\})?/g;
const BRACES = /\\[^]|[{}\n]/g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const TEX = "\\()[]{},;:"; // what a backslash before it does not escape: \( \\ \{ \, are TeX's

// Letters and digits of scripts that put spaces between words, mathematical letters too.
const WORD = String.raw`(?:(?=[\p{L}\p{N}])[\0-\u0dff\u1e00-\u2e7f\u{1d400}-\u{1d7ff}])`;
const LETTER = String.raw`(?:(?!\p{Nd})${WORD})`;
const [IS_WORD, IS_LETTER] = [new RegExp(`^${WORD}`, "u"), new RegExp(`^${LETTER}`, "u")];
// What a factor ends with, and what the next begins with.
const ENDS = new RegExp(String.raw`^(?:${WORD}|[)\]}|!%'′″°$∞\u0300-\u036f])`, "u");
const BEGINS = new RegExp(String.raw`^(?:${WORD}|[(\[{\\|$√∞∑∫€£]|[-+.]\d)`, "u");
const POWER_OF = new RegExp(String.raw`\*${WORD}$`, "u");
const POWER = new RegExp(`^${WORD}(?!${WORD})`, "u");
// 3, (3, x, (x but not (word
const NUMBER = new RegExp(String.raw`^[(\[{]*(?:\d|${LETTER}(?!${WORD}))`, "u");
const ENTITY = /&(?:(amp|lt|gt|quot|apos|nbsp)|#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6}));/y;
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const DEEPEST = 16; // elements within each other; what is deeper is shown without its own
const LONGEST_LABEL = 200;

/**
 * Append the inline Markdown of `source` to an element. `links`: addresses by label; `notes`: the
 * footnotes there are; `asked` gets every label that is referred to, defined or not.
 */
export function appendInline(into, source, { links, notes, asked }) {
  build(into, scan(source, { links, notes, asked }));
}

// Pieces: { text }, { code }, { formula }, { newline }, { note }, { link, close } and delimiter runs such as **,
// { char, count, closes, opens }: tags that end before it and begin after it.

/** The pieces of a paragraph. */
export function scan(source, defined) {
  const pieces = [];
  const openers = { "*": [], _: [], "~": [] };
  const brackets = [];
  const ticks = backquotes(source);
  const ends = new Map(); // where each end of a formula comes next
  const text = (value) => value && pieces.push({ text: value });
  const link = (found) => {
    pieces.push({ link: found.link }, { text: found.text }, { close: true });
    return found.end;
  };
  let at = 0;
  SPECIAL.lastIndex = 0;
  for (let match; (match = SPECIAL.exec(source)); SPECIAL.lastIndex = at) {
    const start = match.index;
    const char = source[start];
    const formula = "\\$".includes(char) ? formulaEnd(source, start, ends) : null;
    text(source.slice(at, start));
    at = start + 1;
    if (char === "\n") {
      pieces.push({ newline: true });
    } else if (formula) {
      at = formula.end;
      const lines = source.slice(start, at).split("\n");
      if (formula.closed) {
        pieces.push({ formula: source.slice(start, at) });
      } else {
        text(lines[0]);
        for (const line of lines.slice(1)) pieces.push({ newline: true }, { text: line });
      }
    } else if (char === "\\") {
      const next = source[at] ?? "";
      if (ESCAPABLE.test(next)) at += 1;
      if (TEX.includes(next)) text(`\\${next}`);
      else if (next !== "\n") text(ESCAPABLE.test(next) ? next : "\\");
    } else if (char === "`") {
      at = codeSpan(source, start, ticks, pieces);
    } else if (char in openers) {
      while (source[at] === char) at += 1;
      delimiter(source, start, at, pieces, openers);
    } else if (char === "[" || (char === "!" && source[at] === "[")) {
      const image = char === "!";
      const piece = { text: image ? "![" : "[", image, index: pieces.length, from: at + image };
      at = piece.from;
      pieces.push(piece);
      brackets.push(piece);
    } else if (char === "]") {
      at = closeBracket(source, at, pieces, brackets, openers, defined);
    } else if (char === "&") {
      ENTITY.lastIndex = start;
      const found = ENTITY.exec(source);
      text(found ? entity(found) : "&");
      if (found) at = ENTITY.lastIndex;
    } else if (char === "<" && matchAt(BREAK, source, start)) {
      pieces.push({ newline: true });
      at = BREAK.lastIndex;
    } else {
      const bare = char === "h" && !/\w/.test(source[start - 1] ?? "");
      const found = char === "<" || bare ? address(source, start, char === "<") : null;
      if (found) at = link(found);
      else text(char);
    }
  }
  text(source.slice(at));
  return pieces;
}

function matchAt(pattern, source, at) {
  pattern.lastIndex = at;
  return pattern.exec(source);
}

/**
 * The `end` of a formula that begins at `start`, and whether it is `closed` there; or null. Markdown
 * would take TeX's backslashes and underscores for its own.
 */
function formulaEnd(source, start, ends) {
  const open = matchAt(FORMULA, source, start)?.[0];
  if (!open) return null;
  if (open === "\\boxed{") return bracesEnd(source, start + open.length);
  const close = FORMULA_END[open] ?? open.replace("\\begin", "\\end");
  const from = start + open.length;
  if (!(ends.get(close) >= from)) {
    let next = source.indexOf(close, from);
    while (open === "$" && source[next - 1] === "\\") next = source.indexOf(close, next + 1);
    ends.set(close, next < 0 ? Infinity : next);
  }
  const end = open === "$" ? dollar(source, from, ends.get(close)) : ends.get(close);
  if (!(end - from <= LONGEST_FORMULA)) {
    // Of several lines, or all of one, it runs to their end, as blocks.js has it.
    const first = !/\S/.test(source.slice(0, start));
    const lines = open !== "$" && open !== "\\(" && (first || source.indexOf("\n", from) >= 0);
    return lines ? { end: source.length, closed: false } : null;
  }
  if (open === "$" && !isFormula(source, start, end)) return null;
  return { end: end + close.length, closed: true };
}

/** Is what stands between two dollars a formula? Else they are amounts of money, or names. */
function isFormula(source, start, end) {
  const inner = source.slice(start + 1, end);
  const apart = /[\w$]/.test(source[start - 1] ?? "") || /[0-9]/.test(source[end + 1] ?? "");
  if (apart || !inner.trim() || inner.includes("\n")) return false;
  if (inner.trim() !== inner) {
    // $ x = 5 $, but not $5 and $7
    const padded = inner[0] === " " && inner.at(-1) === " ";
    return padded && !WORDS.test(inner.replace(COMMANDS, "")) && /[\\^_={}]/.test(inner);
  }
  if (!matchAt(AFTER, source, end + 1)) return /[\\^{}]/.test(inner); // $2^n$fold, not $HOME=$PATH
  return /[\\^_={}]/.test(inner) || !WORDS.test(inner);
}

/** The dollar that ends a formula: not an amount's, nor one of a text within braces. */
function dollar(source, from, first) {
  let [deep, seen, end] = [0, from, first];
  for (let tries = 0; tries < MOST_DOLLARS && end - from <= LONGEST_FORMULA; tries += 1) {
    if (source[end - 1] !== "\\") {
      const piece = source.slice(seen, end);
      deep += (piece.match(/(?<!\\)\{/g) ?? []).length - (piece.match(/(?<!\\)\}/g) ?? []).length;
      if (deep <= 0) return end;
      seen = end;
    }
    end = source.indexOf("$", end + 1);
    if (end < 0) break;
  }
  return Infinity;
}

/** Where the braces end that are open at `from`, on the same line. */
function bracesEnd(source, from) {
  let depth = 1;
  BRACES.lastIndex = from;
  for (let match; (match = BRACES.exec(source)); ) {
    depth += { "{": 1, "}": -1 }[match[0]] ?? 0;
    if (BRACES.lastIndex - from > LONGEST_BOX || match[0] === "\n") return null;
    if (!depth) return { end: BRACES.lastIndex, closed: true };
  }
  return null;
}

function entity([, name, decimal, hex]) {
  if (name) return NAMED[name];
  const code = decimal ? parseInt(decimal, 10) : parseInt(hex, 16);
  const good = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
  return good ? String.fromCodePoint(code) : "\ufffd";
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

/**
 * Whether a run of * or _ may begin emphasis, and whether it may end it: not where it multiplies.
 * The terminal's rules are the same (`chat/render.py`).
 */
function may(source, start, end) {
  const before = start > 0 ? characterBefore(source, start) : "";
  const rest = source.slice(end, end + 44);
  if (/^[([{]/.test(before) && /^[)\]}]/.test(rest)) return [false, false]; // count(*)
  const around = before + rest.slice(0, 1);
  if (around === "><") return [false, false]; // <1,2>*<3,4>
  if (!(ENDS.test(before) && BEGINS.test(rest))) {
    const earlier = source.slice(Math.max(0, start - 40), start);
    const ahead = /\d +$|(?:\.\.|[\u2026\u22ef])$/.test(earlier); // 2 *x, ...*n
    const number = ahead && NUMBER.test(rest);
    const bracket = /[)\]}] +$/.test(earlier) && /^[([{]*\d/.test(rest); // (a) *(2
    const dots = ENDS.test(before) && /^(?:\.\.|[\u2026\u22ef])/.test(rest); // (n - 1)*...
    const pattern = source.slice(start, end) === "*" && around.includes("."); // [a-z].* or *.py
    return [!number && !bracket && !dots && !pattern, true];
  }
  if (source[start] === "_") return [false, false]; // a_{n}
  const letters = IS_LETTER.test(before) && IS_LETTER.test(rest);
  // **C**entral, *word*s: what was begun with this word may end in it; but **x**n is a power.
  const word = source.slice(Math.max(0, start - 44), start);
  const mark = "\\*".repeat(end - start);
  const power = POWER_OF.test(word) && POWER.test(rest);
  const opened = !power && new RegExp(String.raw`(?:^|[^*])${mark}[^\s*]{1,40}$`, "u").exec(word);
  let begun = opened && !ENDS.test(opened[0]);
  if (end - start === 1) return [false, letters && begun];
  if (opened && !begun) begun = new RegExp(`[^*]${mark}${LETTER}{2,40}$`, "u").test(word);
  // (a + b)**n, but (as said)**Answer:**
  if (!IS_WORD.test(before)) return [!NUMBER.test(rest), begun];
  return [letters && new RegExp(`^${LETTER}{2,40}${mark}`, "u").test(rest), begun];
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
  const [opens, closes] = char === "~" ? [true, true] : may(source, start, end);
  const run = {
    char,
    count: end - start,
    index: pieces.length,
    closes: [],
    opens: [],
    canOpen: left && (!word || !right || markBefore) && opens,
    canClose: right && (!word || !left || markAfter) && closes,
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

/** The label that brackets just closed at `at` refer by, and where that ends; or null. */
function reference(source, open, at) {
  let label = source.slice(open.from, Math.min(at - 1, open.from + LONGEST_LABEL + 1));
  let end = at;
  if (source[at] === "[") {
    const close = source.slice(at + 1, at + 2 + LONGEST_LABEL).indexOf("]");
    const given = source.slice(at + 1, at + 1 + close);
    if (close >= 0 && !given.includes("[")) end = at + 2 + close;
    if (end > at && given.trim()) label = given;
  }
  return label.length <= LONGEST_LABEL ? { label: labelOf(label), end } : null;
}

/** After a `]`: make a link or a footnote's mark of it where it is one. Returns where to go on. */
function closeBracket(source, at, pieces, brackets, openers, { links, notes, asked }) {
  const open = brackets.pop();
  let found = open && source[at] === "(" ? destination(source, at) : null;
  let link = found && safeUrl(found.url);
  const named = open && !link ? reference(source, open, at) : null;
  if (named) {
    asked.add(named.label);
    const short = source[open.from] === "^" && at - open.from <= LONGEST_LABEL;
    const note = short ? labelOf(source.slice(open.from + 1, at - 1)) : null;
    if (note !== null) asked.add(`^${note}`);
    if (note !== null && notes.has(note)) {
      dropAfter(openers, open.index);
      pieces.length = open.index;
      pieces.push(...(open.image ? [{ text: "!" }] : []), { note });
      return at;
    }
    link = links.get(named.label);
    found = { url: link, end: named.end };
  }
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
  for (const [index, piece] of pieces.entries()) {
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
    } else if (piece.formula !== undefined) {
      flush();
      const span = h("span", { class: "maths" });
      setFormula(span, piece.formula);
      stack.at(-1).append(joined(span, pieces[index + 1]));
    } else if (piece.note !== undefined) {
      flush();
      stack.at(-1).append(h("sup", {}, noteMark(piece.note)));
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

/** A formula with the point or comma after it, which must not begin the next line. */
function joined(span, next) {
  const mark = /^[.,;:!?)\]]+/.exec(next?.text ?? "")?.[0];
  if (!mark) return span;
  next.text = next.text.slice(mark.length);
  return h("span", { class: "joined" }, span, mark);
}

/** A footnote's mark in the text; both it and the footnote lead to each other. */
function noteMark(label) {
  const go = ({ currentTarget: mark }) => {
    const all = mark.closest(".markdown")?.querySelectorAll(".footnote") ?? [];
    const note = [...all].find((one) => one.dataset.label === label);
    note?.scrollIntoView({ block: "nearest" });
    note?.querySelector("button").focus();
  };
  const all = { type: "button", class: "ref", "data-label": label, onclick: go };
  return h("button", { ...all, "aria-label": `Footnote ${label}` }, label);
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
