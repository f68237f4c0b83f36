// Markdown as DOM nodes, block by block; the answers of a model are never trusted with more.

import { copyFrom, h } from "./dom.js";
import { appendInline } from "./inline.js";

const DEEPEST = 10; // lists and quotes within each other; deeper ones are paragraphs
const MOST_COLUMNS = 64;

const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const FENCE = /^ *(`{3,}|~{3,})/;
const QUOTE = /^ {0,3}>/;
const MARKER = /^( *)(?:([-+*•])|(\d{1,9})([.)]))( +|$)/;

/** A document that grows: what can't change any more is drawn once and then left alone. */
export class Rendering {
  constructor(into) {
    this.into = into;
    this.text = "";
    this.settled = 0; // characters of `text` whose blocks are final
    this.tail = []; // the elements after them
  }

  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) {
      this.into.replaceChildren();
      this.settled = 0;
      this.tail = [];
    }
    this.text = text;
    const lines = text.slice(this.settled).replace(/\r\n?/g, "\r").split(/[\n\r]/);
    const found = blocks(lines, 0);
    if (this.grow(found)) return;
    for (const element of this.tail) element.remove();
    this.tail = found.map((block) => render(block, 0));
    this.into.append(...this.tail);
    this.shown = found;
    // A block is final once the next has a whole line: until then that may still join it.
    let last = found.length - 1;
    if (last > 0 && found[last].line >= lines.length - 1) last -= 1;
    if (last > 0 && !text.includes("\r")) {
      for (const line of lines.slice(0, found[last].line)) this.settled += line.length + 1;
      this.tail = this.tail.slice(last);
      this.shown = found.slice(last);
    }
  }

  /** A single code block that got longer keeps its element: long ones stay cheap to stream. */
  grow(found) {
    const [before, now] = [this.shown?.[0], found[0]];
    const one = this.shown?.length === 1 && found.length === 1;
    if (!one || before.type !== "fence" || now.type !== "fence") return false;
    if (before.info !== now.info || !now.text.startsWith(before.text)) return false;
    this.tail[0].querySelector("code").firstChild.appendData(now.text.slice(before.text.length));
    this.shown = found;
    return true;
  }
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

/** The blocks of some lines; each has `line`, the index of its first. */
function blocks(lines, depth) {
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
  if (QUOTE.test(line) && depth < DEEPEST) return quote(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  const marker = depth < DEEPEST ? markerOf(line) : null;
  if (marker) return list(lines, at, depth, marker);
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

function fence(lines, at, { mark, info, indent }) {
  const inner = [];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const trimmed = lines[end].trim();
    if (trimmed.length >= mark.length && trimmed === mark[0].repeat(trimmed.length)) break;
    inner.push(lines[end].slice(Math.min(indent, indentOf(lines[end]))));
  }
  const block = { type: "fence", info: info.split(/\s/, 1)[0], text: inner.join("\n") };
  return [block, end + 1];
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
  if (!match || isRule(line)) return null;
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
  let end = at;
  for (; end < lines.length; end += 1) {
    const line = lines[end].replaceAll("\t", "    ");
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
    blank = false;
  }
  const inner = items.map((item) => blocks(item, depth + 1));
  return [{ type: "list", start: first.start, loose, items: inner }, end];
}

/** Does this line end the paragraph before it? */
function startsBlock(lines, at, depth) {
  const line = lines[at];
  if (HEADING.test(line) || fenceOf(line) || isRule(line) || isTable(lines, at)) return true;
  if (depth >= DEEPEST) return false;
  if (QUOTE.test(line)) return true;
  const marker = markerOf(line);
  // "in the year\n1984. It was": only a list's first number interrupts a sentence.
  return Boolean(marker && line.trim().length > 2 && (marker.start ?? 1) <= 1);
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end, depth)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim());
  return [{ type: "paragraph", text: text.join("\n") }, end];
}

function render(block, depth) {
  switch (block.type) {
    case "heading": // the page's own headings stand above an answer's
      return withInline(h(`h${Math.min(6, block.level + 2)}`), block.text);
    case "fence":
      return codeBlock(block);
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, ...block.blocks.map((inner) => render(inner, depth + 1)));
    case "table":
      return tableElement(block);
    case "list": {
      const tag = block.start === null ? "ul" : "ol";
      const start = block.start === null || block.start === 1 ? null : block.start;
      const items = block.items.map((item) => listItem(item, block.loose, depth + 1));
      return h(tag, { start }, ...items);
    }
    default:
      return withInline(h("p"), block.text);
  }
}

function withInline(element, text) {
  appendInline(element, text);
  return element;
}

function listItem(item, loose, depth) {
  const element = h("li");
  item.forEach((block, index) => {
    if (block.type !== "paragraph" || loose) {
      element.append(render(block, depth));
      return;
    }
    const box = /^\[[ xX]\] /.exec(block.text);
    const text = box ? (box[0][1] === " " ? "☐ " : "☑ ") + block.text.slice(4) : block.text;
    if (index === 0) appendInline(element, text);
    else element.append(withInline(h("p"), text));
  });
  return element;
}

function codeBlock({ info, text }) {
  const code = h("code", {});
  code.append(document.createTextNode(text));
  const copy = h("button", { type: "button", class: "quiet" }, "Copy");
  copy.addEventListener("click", () => copyFrom(copy, code.textContent));
  const head = h("div", { class: "code-head" }, h("span", {}, info || "text"), copy);
  // Focusable, so that the keyboard can scroll a long line.
  return h("div", { class: "code" }, head, h("pre", { tabindex: 0 }, code));
}

function tableElement({ aligns, head, rows }) {
  const cells = (tag, row) =>
    row.map((text, index) => withInline(h(tag, { class: aligns[index] }), text));
  const top = h("thead", {}, h("tr", {}, ...cells("th", head)));
  const body = h("tbody", {}, ...rows.map((row) => h("tr", {}, ...cells("td", row))));
  return h("div", { class: "table", tabindex: 0 }, h("table", {}, top, body));
}
