// Two answers side by side, and where their texts first differ.

import { arrange, h, plural } from "./dom.js";
import { VoteButtons } from "./votes.js";

const BLOCKS = "p, li, h3, h4, h5, h6, pre, td, th, blockquote";
// What stands between words; Chinese and Japanese put nothing there, and each sign is one.
const APART = /[\s\u3000-\u9fff\uff00-\uffef]/;
// Highlights colour a range of text without touching the elements it runs through.
const shared = globalThis.Highlight ? new Highlight() : null;
if (shared) CSS.highlights.set("differs", shared);

/** The text of an answer as it is read, and the text nodes it comes from. */
export function textOf(body) {
  const parts = [];
  let text = "";
  let before = null;
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const formula = node.nodeType === Node.ELEMENT_NODE; // its source is what is compared
    if (formula && !node.classList.contains("set")) continue;
    if (node.parentElement.closest(".code-head, .set")) continue;
    const block = node.parentElement.closest(BLOCKS);
    if (block !== before && text) text += "\n";
    before = block;
    parts.push({ node, at: text.length });
    text += formula ? node.dataset.tex : node.data;
  }
  return { text, parts };
}

/** Where the first differing word begins in both; null while they say the same. */
export function firstDifference(a, b, overA, overB) {
  const least = Math.min(a.length, b.length);
  let at = 0;
  while (at < least && a[at] === b[at]) at += 1;
  if (at === least) {
    if (a.length === b.length) return null;
    // One is ahead of the other, or the other has ended there.
    if (!(a.length < b.length ? overA : overB)) return null;
    if (/\s/.test((a.length > b.length ? a : b)[at])) return at;
  }
  while (at > 0 && !APART.test(a[at - 1])) at -= 1;
  return at;
}

/** The word at `at`, or null where the text has ended there. */
function wordFrom({ text, parts }, at) {
  let start = at;
  while (start < text.length && /\s/.test(text[start])) start += 1;
  if (start === text.length) return null;
  let end = start + 1;
  while (end < text.length && !APART.test(text[end])) end += 1;
  const place = (offset, least) => {
    const { node, at: from } = parts.findLast((part) => part.at + least <= offset);
    if (node.nodeType === Node.ELEMENT_NODE) return [node, least ? node.childNodes.length : 0];
    return [node, Math.min(offset - from, node.length)];
  };
  const range = new Range();
  range.setStart(...place(start, 0));
  range.setEnd(...place(end, 1));
  return range;
}

/** A row of the thread: two messages of the same turn. */
export class Row {
  constructor() {
    this.caption = h("p", { class: "caption" });
    this.columns = [h("div", { class: "column" }), h("div", { class: "column" })];
    this.pair = h("div", { class: "pair" }, ...this.columns);
    this.element = h("div", { class: "row", role: "group", "aria-label": "Two answers" });
    const go = { type: "button", class: "where", hidden: true, onclick: () => this.go() };
    this.where = h("button", go, "Go there");
    this.votes = new VoteButtons();
    const head = h("div", { class: "row-head" }, this.caption, this.where);
    this.element.append(head, this.pair, this.votes.element);
    this.marks = this.columns.map(() => h("span", { class: "mark", "aria-hidden": "true" }));
    this.ranges = [];
    this.observer = new ResizeObserver(() => this.place());
    this.observer.observe(this.pair);
  }

  /** Put the messages' views in; either may be missing. */
  fill(views) {
    this.views = views;
    views.forEach((view, lane) => arrange(this.columns[lane], view ? [view.element] : []));
  }

  /** Were both drawn the same way? */
  get alike() {
    const [a, b] = this.views.map(({ node }) => node.stats ?? {});
    return a.temperature === b.temperature && (a.seed === b.seed || a.temperature === 0);
  }

  /** Say and show where the answers differ. An answer that was cut short is not over. */
  mark() {
    const [a, b] = this.views;
    const now = this.views.flatMap((view) => {
      return view ? [view, view.node.content, view.node.state, view.node.stats?.seed] : [null];
    });
    const before = this.marked ?? [];
    if (now.length === before.length && now.every((one, at) => one === before[at])) return;
    this.marked = now;
    this.clear();
    this.caption.textContent = "";
    this.votes.show(null);
    if (!a?.rendering || !b?.rendering) return;
    const texts = [textOf(a.body), textOf(b.body)];
    const [over, alsoOver] = this.views.map(({ node }) => node.state === "done");
    const at = firstDifference(texts[0].text, texts[1].text, over, alsoOver);
    const same = texts[0].text.slice(0, at ?? Infinity);
    this.vote(at !== null);
    if (at === null) {
      const exact = a.node.content === b.node.content;
      const both = exact ? "Identical answers." : "The same words, laid out differently.";
      if (same && texts[1].text) {
        this.caption.textContent = over && alsoOver ? both : "The same so far.";
      }
      return;
    }
    const words = same.split(/\s+/).filter(Boolean).length;
    this.caption.textContent = words
      ? `The same for ${plural(words, "word")}, then they differ.`
      : "They differ from the first word.";
    const drawn = " One was drawn with other settings or another seed.";
    if (!this.alike) this.caption.textContent += drawn;
    this.ranges = texts.map((text) => wordFrom(text, at));
    for (const range of this.ranges) if (range) shared?.add(range);
    this.where.hidden = !words; // else it is seen at once
    this.place();
  }

  /** Offer a vote between two models' answers that are over and say different things. */
  vote(differ) {
    const nodes = this.views.map(({ node }) => node);
    const over = nodes.every(({ state, content }) => ["done", "stopped"].includes(state) && content);
    const two = nodes[0].model !== nodes[1].model;
    this.votes.show(differ && over && two ? nodes : null);
  }

  /** Bring the place where the answers differ into the middle of the screen. */
  go() {
    const ranges = this.ranges.filter(Boolean);
    const marks = this.marks.filter((mark) => mark.isConnected);
    if (ranges.length) marks[0]?.scrollIntoView({ block: "center" });
  }

  /** The marks stand in the margin, at the line where the difference begins. */
  place() {
    this.ranges.forEach((range, lane) => {
      const body = this.views[lane].body;
      const rect = range?.getClientRects()[0];
      if (!rect || !body.isConnected) return this.marks[lane].remove();
      if (!this.marks[lane].isConnected) body.after(this.marks[lane]);
      const top = rect.top - this.marks[lane].offsetParent.getBoundingClientRect().top;
      this.marks[lane].style.top = `${top}px`;
      this.marks[lane].style.height = `${rect.height}px`;
    });
  }

  clear() {
    for (const range of this.ranges) if (range) shared?.delete(range);
    for (const mark of this.marks) mark.remove();
    this.where.hidden = true;
    this.ranges = [];
  }

  close() {
    this.clear();
    this.votes.close();
    this.observer.disconnect();
    this.element.remove();
  }
}
