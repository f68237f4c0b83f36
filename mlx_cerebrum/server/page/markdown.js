// Markdown as DOM nodes, block by block; the answers of a model are never trusted with more.

import { blocks } from "./blocks.js";
import { copyFrom, h } from "./dom.js";
import { appendInline } from "./inline.js";
import { setCode, setFormula, setGrowingCode } from "./maths.js";

const HEADINGS = "h3, h4, h5, h6";
// Scripts that are written from right to left, where a text's first letter is of them.
const RIGHT_TO_LEFT =
  /^[^\p{L}]*[\p{sc=Hebrew}\p{sc=Arabic}\p{sc=Syriac}\p{sc=Thaana}\p{sc=Nko}\p{sc=Adlam}]/u;

/** A document that grows: what can't change any more is drawn once and then left alone. */
export class Rendering {
  constructor(into) {
    this.into = into;
    this.begin();
  }

  begin() {
    this.text = "";
    this.settled = 0; // characters of `text` whose blocks are final
    this.final = []; // those blocks: { block, source, element, headings, asked }
    this.tail = []; // and the ones after them
    this.defined = new Map(); // what the final ones define, by label; a footnote's begins with ^
    this.all = new Map(); // and the tail too
    this.open = []; // the headings that the next one of the tail may be under
    this.into.replaceChildren();
  }

  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.begin();
    this.text = text;
    const rest = text.slice(this.settled).replace(/\r\n?/g, "\r");
    const lines = rest.split(/[\n\r]/);
    const found = blocks(lines, 0);
    this.define(found);
    const before = this.tail;
    let [line, end] = [0, 0];
    this.tail = found.map((block, index) => {
      const begin = end;
      for (const next = found[index + 1]?.line ?? lines.length; line < next; line += 1) {
        end += lines[line].length + 1;
      }
      return this.place(before[index], block, rest.slice(begin, end));
    });
    for (const { element } of before.slice(found.length)) element.remove();
    setLevels(this.tail, this.open);
    // A block is final once the next has a whole line: until then that may still join it.
    let last = found.length - 1;
    if (last > 0 && found[last].line >= lines.length - 1) last -= 1;
    if (last <= 0 || text.includes("\r")) return;
    for (const line of lines.slice(0, found[last].line)) this.settled += line.length + 1;
    for (const { block } of this.tail.slice(0, last)) collect(block, this.defined);
    this.open = setLevels(this.tail.slice(0, last), this.open);
    this.final.push(...this.tail.slice(0, last));
    this.tail = this.tail.slice(last);
  }

  /** Take over what the tail defines by now; what refers to what is new is drawn anew. */
  define(found) {
    const now = new Map(this.defined);
    for (const block of found) collect(block, now);
    const before = this.all;
    this.all = now;
    const labels = [...new Set([...before.keys(), ...now.keys()])];
    const changed = labels.filter((label) => before.get(label) !== now.get(label));
    if (!changed.length) return;
    for (const one of [...this.final, ...this.tail]) {
      if (changed.some((label) => one.asked.has(label))) this.draw(one);
    }
  }

  /** The block in its place, by the element that stands there where that can stay. */
  place(old, block, source) {
    if (old?.source === source) return { ...old, block };
    if (old && goesOn(old.block, block)) {
      const code = old.element.querySelector("code");
      if (setText(code, old.block.text, block.text)) {
        colour(code, block);
        return { ...old, block, source };
      }
    }
    const one = { block, source, element: old?.element ?? null };
    this.draw(one);
    return one;
  }

  draw(one) {
    one.asked = new Set();
    const { all } = this;
    const notes = { has: (label) => all.has(`^${label}`) };
    const element = render(one.block, { links: all, notes, asked: one.asked });
    const levels = one.headings?.map((heading) => heading.getAttribute("aria-level"));
    one.headings = element.matches(HEADINGS) ? [element] : [...element.querySelectorAll(HEADINGS)];
    levels?.forEach((level, index) => {
      if (level) one.headings[index]?.setAttribute("aria-level", level);
    });
    if (one.element) one.element.replaceWith(element);
    else this.into.append(element);
    one.element = element;
  }
}

/** Is it the same program, longer or with its end? */
function goesOn(before, now) {
  if (before.type !== "fence" || now.type !== "fence" || before.info !== now.info) return false;
  return !before.closed || now.closed === before.closed;
}

/**
 * Change the text of an element at its end, so that long programs stay cheap to stream and keep
 * their colours; false where that can't be done.
 */
function setText(code, before, now) {
  const last = code.lastChild?.nodeType === Node.TEXT_NODE ? code.lastChild : null;
  if (now.startsWith(before)) {
    if (last) last.appendData(now.slice(before.length));
    else code.append(now.slice(before.length));
    return true;
  }
  // A part of the fence that ends it was taken for a line of it.
  const less = before.length - now.length;
  if (!before.startsWith(now) || !last || last.length < less) return false;
  last.deleteData(last.length - less, less);
  return true;
}

/** What a block and those within it define; of two with one label the first counts. */
function collect(block, into) {
  const define = (label, value) => {
    if (!into.has(label)) into.set(label, value);
  };
  if (block.type === "definition") define(block.label, block.url);
  if (block.type === "footnote") define(`^${block.label}`, null);
  const inner = block.blocks ?? block.items?.flat() ?? [];
  for (const one of inner) collect(one, into);
}

/**
 * Headings below the message's own (2), none more than one level deeper than that before it; `open`:
 * the levels they were written with of those that the first may be under. Returns it for the next.
 */
function setLevels(blocks, open) {
  const above = [...open];
  for (const heading of blocks.flatMap(({ headings }) => headings)) {
    const own = Number(heading.localName[1]);
    while (above.length && above.at(-1) >= own) above.pop();
    above.push(own);
    const level = 2 + above.length;
    if (level === own) heading.removeAttribute("aria-level");
    else heading.setAttribute("aria-level", level);
  }
  return above;
}

function render(block, context) {
  switch (block.type) {
    case "heading": // the page's own headings stand above an answer's
      return withInline(h(`h${Math.min(6, block.level + 2)}`), block.text, context);
    case "fence":
      return codeBlock(block);
    case "formula": {
      const element = h("p", { class: "formula" }, block.text);
      if (block.closed) setFormula(element, block.text);
      return element;
    }
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", { dir: directionOf(block) }, ...renderAll(block.blocks, context));
    case "table":
      return tableElement(block, context);
    case "list": {
      const tag = block.start === null ? "ul" : "ol";
      const start = block.start === null || block.start === 1 ? null : block.start;
      const items = block.items.map((item) => listItem(item, block.loose, context));
      return h(tag, { start, dir: directionOf(block) }, ...items);
    }
    case "footnote":
      return footnote(block, context);
    case "definition": {
      const at = block.text.indexOf("]:") + 2; // shown: nothing of an answer is hidden
      const element = h("p", { class: "definition" }, block.text.slice(0, at));
      return withInline(element, block.text.slice(at), context);
    }
    default:
      return withInline(h("p"), block.text, context);
  }
}

function renderAll(all, context) {
  return all.map((block) => render(block, context));
}

/** "rtl" for lists, quotes and tables that begin so; the lines of a text find it by themselves. */
function directionOf(block) {
  let first = block;
  while (first && first.text === undefined && !first.head) {
    first = first.blocks?.[0] ?? first.items?.[0]?.[0];
  }
  return RIGHT_TO_LEFT.test(first?.text ?? first?.head?.join(" ") ?? "") ? "rtl" : null;
}

function withInline(element, text, context) {
  appendInline(element, text, context);
  return element;
}

function listItem(item, loose, context) {
  const element = h("li");
  item.forEach((block, index) => {
    if (block.type !== "paragraph" || loose) {
      element.append(render(block, context));
      return;
    }
    const box = /^\[[ xX]\] /.exec(block.text);
    const text = box ? (box[0][1] === " " ? "☐ " : "☑ ") + block.text.slice(4) : block.text;
    if (index === 0) appendInline(element, text, context);
    else element.append(withInline(h("p"), text, context));
  });
  return element;
}

function codeBlock(block) {
  const code = h("code", {});
  code.append(document.createTextNode(block.text));
  colour(code, block);
  const copy = h("button", { type: "button", class: "quiet" }, "Copy");
  copy.addEventListener("click", () => copyFrom(copy, code.textContent));
  const head = h("div", { class: "code-head" }, h("span", {}, block.info || "text"), copy);
  // Focusable, so that the keyboard can scroll a long line.
  return h("div", { class: "code" }, head, h("pre", { tabindex: 0 }, code));
}

function colour(code, { info, text, closed }) {
  if (closed) setCode(code, info, text);
  else setGrowingCode(code, info, text);
}

/** A footnote where it was written, with a way back to its mark in the text. */
function footnote({ label, blocks: inner }, context) {
  const back = ({ currentTarget }) => {
    const all = currentTarget.closest(".markdown")?.querySelectorAll(".ref") ?? [];
    const mark = [...all].find((one) => one.dataset.label === label);
    mark?.scrollIntoView({ block: "nearest" });
    mark?.focus();
  };
  const name = `Back to footnote ${label} in the text`;
  const all = { type: "button", class: "ref-back", "aria-label": name, title: name };
  const button = h("button", { ...all, onclick: back }, label);
  const text = h("div", {}, ...renderAll(inner, context));
  return h("div", { class: "footnote", "data-label": label }, button, text);
}

function tableElement(block, context) {
  const { aligns, head, rows } = block;
  const cells = (tag, row) =>
    row.map((text, index) => withInline(h(tag, { class: aligns[index] }), text, context));
  const top = h("thead", {}, h("tr", {}, ...cells("th", head)));
  const body = h("tbody", {}, ...rows.map((row) => h("tr", {}, ...cells("td", row))));
  const all = { class: "table", tabindex: 0, dir: directionOf(block) };
  return h("div", all, h("table", {}, top, body));
}
