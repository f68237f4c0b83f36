// Markdown as DOM nodes, block by block; the answers of a model are never trusted with more.

import { blocks } from "./blocks.js";
import { copyFrom, h } from "./dom.js";
import { appendInline } from "./inline.js";
import { setCode, setFormula } from "./maths.js";

/** A document that grows: what can't change any more is drawn once and then left alone. */
export class Rendering {
  constructor(into) {
    this.into = into;
    this.text = "";
    this.settled = 0; // characters of `text` whose blocks are final
    this.tail = []; // the elements after them
    this.shown = []; // and their blocks
  }

  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) {
      this.into.replaceChildren();
      this.settled = 0;
      this.tail = [];
      this.shown = [];
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
    const [before, now] = [this.shown[0], found[0]];
    const one = this.shown.length === 1 && found.length === 1;
    if (!one || before.type !== "fence" || now.type !== "fence") return false;
    if (before.info !== now.info || !now.text.startsWith(before.text)) return false;
    if (before.closed !== now.closed) return false;
    const more = now.text.slice(before.text.length);
    if (more) this.tail[0].querySelector("code").firstChild.appendData(more);
    this.shown = found;
    return true;
  }
}

function render(block, depth) {
  switch (block.type) {
    case "heading": // the page's own headings stand above an answer's
      return withInline(h(`h${Math.min(6, block.level + 2)}`), block.text);
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

function codeBlock({ info, text, closed }) {
  const code = h("code", {});
  code.append(document.createTextNode(text));
  if (closed) setCode(code, info, text); // while it grows it has no colours that would change
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
