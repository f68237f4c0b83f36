// The blocks of a Markdown text, as plain data; nothing here draws.

import { labelOf, safeUrl } from "./links.js";

const DEEPEST = 10; // lists and quotes within each other; deeper ones are paragraphs
const MOST_COLUMNS = 64;

const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const FENCE = /^ *(`{3,}|~{3,})/;
const QUOTE = /^ {0,3}>/;
const MARKER = /^( *)(?:([-+*•])|(\d{1,9})([.)]))( +|$)/;
const SUM = /^ *\+ *\d/; // a sum that goes on, no item of a list
const INDENTED = /^(?: {4}| {0,3}\t)/;
// Set apart by hand where it is no code: a formula, bold words.
const NO_CODE = /^\s*(?:\\[([]|\\begin|\$|\*\*\S)/;
const DEFINITION = /^ {0,3}\[(?!\^)([^[\]]{1,200})\]:[ \t]*(<[^<>]{1,2048}>|[^\s<]\S{0,2047})(?:[ \t]+(?:"[^"]*"|'[^']*'|\([^()]*\)))?[ \t]*$/;
const FOOTNOTE = /^ {0,3}\[\^([^\s[\]]{1,50})\]:(?:[ \t]|$)/;
const LONGEST_TITLE = 100; // characters of a heading that is underlined
const DISPLAY = /(`+)[^`]*\1|\\(?:begin|end)\{[^{}]*\}|\\.|\$\$/g;

function indentOf(line) {
  return line.length - line.trimStart().length;
}

/** The blocks of some lines; each has `line`, the index of its first. */
export function blocks(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = oneBlock(lines, at, depth);
    found.push({ ...block, line: at });
    at = end;
  }
  return found;
}

function oneBlock(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: title(line) }, at + 1];
  const mark = fenceOf(line);
  if (mark) return fence(lines, at, mark);
  if (isRule(line)) return [{ type: "rule" }, at + 1];
  if (isIndented(line)) return indented(lines, at);
  if (FOOTNOTE.test(line) && depth < DEEPEST) return footnote(lines, at, depth);
  if (definitionOf(line)) return [definitionOf(line), at + 1];
  if (QUOTE.test(line) && depth < DEEPEST) return quote(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  const marker = depth < DEEPEST ? markerOf(line) : null;
  if (marker) return list(lines, at, depth, marker);
  if (leftOpen(line)) return formula(lines, at);
  return paragraph(lines, at, depth);
}

function title(line) {
  const text = line.trim().replace(/^#+/, "").trim();
  let end = text.length;
  while (end && text[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trim() : text;
}

function isRule(line) {
  const marks = line.replace(/[ \t]/g, "");
  const first = marks[0];
  if (marks.length < 3 || !"-*_".includes(first)) return false;
  return marks === first.repeat(marks.length);
}

function fenceOf(line) {
  const match = FENCE.exec(line);
  if (!match) return null;
  const info = line.slice(match[0].length).trim();
  if (match[1][0] === "`" && info.includes("`")) return null;
  return { mark: match[1], info, indent: indentOf(line) };
}

/** The mark of the code that begins on this line, behind markers of lists perhaps. */
function fenceWithin(line) {
  let rest = line;
  for (let deep = 0; deep < DEEPEST; deep += 1) {
    const marker = MARKER.exec(rest);
    if (!marker) break;
    rest = rest.slice(marker[0].length);
  }
  return fenceOf(rest)?.mark ?? null;
}

function closes(line, mark) {
  const trimmed = line.trim();
  return trimmed.length >= mark.length && trimmed === mark[0].repeat(trimmed.length);
}

function fence(lines, at, { mark, info, indent }) {
  const inner = [];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    if (closes(lines[end], mark)) break;
    inner.push(lines[end].slice(Math.min(indent, indentOf(lines[end]))));
  }
  const closed = end < lines.length;
  const block = { type: "fence", info: info.split(/\s/, 1)[0], text: inner.join("\n"), closed };
  return [block, end + 1];
}

/** Four spaces before it, and no item of a list, which models indent as they like. */
function isIndented(line) {
  return INDENTED.test(line) && !markerOf(line) && !NO_CODE.test(line);
}

function indented(lines, at) {
  let end = at + 1;
  for (let next = end; next < lines.length; next += 1) {
    if (INDENTED.test(lines[next]) && lines[next].trim()) end = next + 1;
    else if (lines[next].trim()) break;
  }
  const text = lines.slice(at, end).map((line) => line.replace(INDENTED, ""));
  return [{ type: "fence", info: "", text: text.join("\n"), closed: true }, end];
}

/** `[label]: address`, to which links in the text refer. */
function definitionOf(line) {
  const match = DEFINITION.exec(line);
  if (!match) return null;
  const url = safeUrl(match[2].replace(/^<|>$/g, ""));
  return url && { type: "definition", label: labelOf(match[1]), url, text: line.trim() };
}

/** A footnote: its line, and those after it that are indented or go on with its paragraph. */
function footnote(lines, at, depth) {
  const [mark, label] = FOOTNOTE.exec(lines[at]);
  const inner = [lines[at].slice(mark.length).trimStart()];
  let end = at + 1;
  let blank = false;
  for (let next = end; next < lines.length; next += 1) {
    const line = lines[next];
    if (!line.trim()) {
      blank = true;
      continue;
    }
    const indent = indentOf(line);
    if (indent < 2 && (blank || startsBlock(lines, next, depth))) break;
    while (inner.length < next - at) inner.push("");
    inner.push(line.slice(Math.min(indent, 4)));
    end = next + 1;
    blank = false;
  }
  return [{ type: "footnote", label: labelOf(label), blocks: blocks(inner, depth + 1) }, end];
}

/** What ends the formula that a line begins and does not end, or null. */
function leftOpen(line) {
  let close = null;
  const text = line.trim();
  for (const { 0: found, index } of text.matchAll(DISPLAY)) {
    const edge = index === 0 || index + found.length === text.length;
    if (close) close = found === close ? null : close;
    else if (found === "\\[") close = "\\]";
    else if (found === "$$" && edge) close = "$$";
    else if (found.startsWith("\\begin")) close = found.replace("\\begin", "\\end");
  }
  return close;
}

/**
 * Lines from one that leaves a formula open to its end or a blank line: no lists, no rules in it.
 * A formula alone is a block of its own, `closed` where its end is there.
 */
function formula(lines, at) {
  const close = leftOpen(lines[at]);
  let end = at + 1;
  let open = true;
  while (open && end < lines.length && lines[end].trim()) {
    open = !lines[end].includes(close);
    end += 1;
  }
  const text = lines.slice(at, end).map((line) => line.trimEnd()).join("\n").trimStart();
  const opening = { "\\]": "\\[", $$: "$$" }[close] ?? close.replace("\\end", "\\begin");
  const found = text.indexOf(close, opening.length);
  const alone = text.startsWith(opening) && found === (open ? -1 : text.length - close.length);
  return [{ type: alone ? "formula" : "paragraph", text, closed: !open }, end];
}

function quote(lines, at, depth) {
  const inner = [];
  let end = at;
  for (; end < lines.length && QUOTE.test(lines[end]); end += 1) {
    const rest = lines[end].trimStart().slice(1);
    inner.push(rest.startsWith(" ") ? rest.slice(1) : rest);
  }
  return [{ type: "quote", blocks: blocks(inner, depth + 1) }, end];
}

function cellsOf(line) {
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  if (row.endsWith("|") && !row.endsWith("\\|")) row = row.slice(0, -1);
  const cells = [""];
  for (const part of row.split(/(\\\||\|)/)) {
    if (part === "|") cells.push("");
    else cells[cells.length - 1] += part === "\\|" ? "|" : part;
  }
  return cells.map((cell) => cell.trim());
}

function isTable(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes("|") || !/^[\s|:-]+$/.test(next)) return false;
  const marks = cellsOf(next);
  if (!marks.every((cell) => /^:?-+:?$/.test(cell)) || marks.length > MOST_COLUMNS) return false;
  return cellsOf(lines[at]).length === marks.length;
}

function table(lines, at) {
  const aligns = cellsOf(lines[at + 1]).map((mark) => {
    if (mark.endsWith(":")) return mark.startsWith(":") ? "center" : "right";
    return mark.startsWith(":") ? "left" : null;
  });
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) {
    rows.push(cellsOf(lines[end]).slice(0, aligns.length));
  }
  return [{ type: "table", aligns, head: cellsOf(lines[at]), rows }, end];
}

function markerOf(line) {
  const match = MARKER.exec(line.replaceAll("\t", "    "));
  if (!match || isRule(line) || SUM.test(line)) return null;
  const [whole, before, bullet, number, dot, after] = match;
  const width = whole.length - after.length;
  return {
    indent: before.length,
    kind: bullet ? "bullet" : dot,
    start: bullet ? null : Number(number),
    // Four or more spaces are code in Markdown, but a slip of the pen in an answer.
    content: width + Math.max(1, Math.min(after.length, 4)),
  };
}

function list(lines, at, depth, first) {
  const items = [];
  let loose = false;
  let blank = false;
  let content = 0;
  let code = null; // the fence that is open in the last item: its lines may stand further left
  let end = at;
  for (; end < lines.length; end += 1) {
    const line = lines[end].replaceAll("\t", "    ");
    if (code) {
      items.at(-1).push(line.slice(Math.min(indentOf(line), content)));
      if (closes(line, code)) code = null;
      blank = false;
      continue;
    }
    if (!line.trim()) {
      blank = true;
      items.at(-1).push("");
      continue;
    }
    const indent = indentOf(line);
    const marker = indent < first.indent + 2 ? markerOf(line) : null;
    if (marker?.kind === first.kind) {
      loose ||= blank && items.length > 0;
      content = marker.content;
      items.push([line.slice(content)]);
    } else if (indent >= first.indent + 2) {
      items.at(-1).push(line.slice(Math.min(indent, content)));
    } else if (blank || marker || startsBlock(lines, end, depth)) {
      break;
    } else {
      items.at(-1).push(line); // a paragraph's next line that was not indented
    }
    code = fenceWithin(items.at(-1).at(-1));
    blank = false;
  }
  const inner = items.map((item) => blocks(item, depth + 1));
  return [{ type: "list", start: first.start, loose, items: inner }, end];
}

/** Does this line end the paragraph before it? */
function startsBlock(lines, at, depth) {
  const line = lines[at];
  if (HEADING.test(line) || fenceOf(line) || isRule(line) || isTable(lines, at)) return true;
  if (leftOpen(line) || FOOTNOTE.test(line) || definitionOf(line)) return true;
  if (depth >= DEEPEST) return false;
  if (QUOTE.test(line)) return true;
  const marker = markerOf(line);
  // "in the year\n1984. It was": only a list's first number interrupts a sentence.
  return Boolean(marker && line.trim().length > 2 && (marker.start ?? 1) <= 1);
}

/** The level of a heading by the line under it; 0 where that is a rule, or a sum's line. */
function underlined(lines, at) {
  const [line, under] = [lines[at].trim(), lines[at + 1]?.trimEnd() ?? ""];
  const mark = /^ {0,3}(?:(={3,})|-{3,})$/.exec(under);
  const words = /\p{L}{2}/u.test(line) && line.length <= LONGEST_TITLE;
  if (!mark || !words || /[=|+]|[.:;,!?\u3002\uff01\uff1f\uff1a]$/.test(line)) return 0;
  return mark[1] ? 1 : 2;
}

function paragraph(lines, at, depth) {
  const level = underlined(lines, at);
  if (level) return [{ type: "heading", level, text: lines[at].trim() }, at + 2];
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end, depth)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim());
  return [{ type: "paragraph", text: text.join("\n") }, end];
}
