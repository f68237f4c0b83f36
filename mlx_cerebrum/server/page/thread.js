// The conversation on the screen: which messages stand where, drawn at most once a frame.

import { guess } from "./attached.js";
import { unfold } from "./chips.js";
import { arrange, byId, plural } from "./dom.js";
import { Row, textOf } from "./compare.js";
import { AnswerView, QuestionView } from "./messages.js";
import { placesOf } from "./search.js";

const BY_HAND = 1000; // milliseconds after a key or a wheel in which scrolling is the reader's
const SPOKEN = 2000; // characters of an answer that are read out when it is there
const QUICK = 8; // milliseconds; after a drawing that took longer the next one waits

const HITS = 500; // marked in one message

// Highlights colour a range of text without touching the elements it runs through.
const marked = globalThis.Highlight ? new Highlight() : null;
if (marked) CSS.highlights.set("found", marked);

const guessed = new WeakMap(); // tokens of messages that the server has not counted

const scroller = byId("scroller");
const thread = byId("thread");
const toEnd = byId("to-end");

export class Thread {
  /** `actions`: what the messages' views call; `runOf(node)`: its Run while it grows. */
  constructor(actions, runOf) {
    this.actions = actions;
    this.runOf = runOf;
    this.views = new Map();
    this.rows = new Map();
    this.dirty = new Set();
    this.following = true;
    this.lastTop = 0;
    this.touched = -Infinity; // when the reader last did something that scrolls
    const touch = (when) => () => (this.touched = when());
    for (const kind of ["wheel", "touchmove", "keydown", "pointerup", "pointercancel"]) {
      addEventListener(kind, touch(() => performance.now()), { passive: true });
    }
    scroller.addEventListener("pointerdown", touch(() => Infinity)); // until it is let go
    scroller.addEventListener("scroll", () => this.scrolled());
    const follower = new ResizeObserver(() => this.follow());
    follower.observe(scroller);
    follower.observe(thread);
    toEnd.addEventListener("click", () => this.end());
  }

  /** Arrange the messages of a conversation; those on the screen already stay as they are. */
  show(conversation, models) {
    if (conversation !== this.conversation) {
      for (const row of this.rows.values()) row.close();
      thread.replaceChildren();
      this.views.clear();
      this.rows.clear();
      this.conversation = conversation;
      this.following = true;
    }
    this.models = models;
    const wanted = [];
    const rows = new Set();
    for (const shown of conversation.rows) {
      if (shown.length === 1) {
        wanted.push(this.view(shown[0], null).element);
      } else {
        const row = this.row(shown);
        rows.add(row);
        wanted.push(row.element);
      }
    }
    for (const [key, row] of this.rows) {
      if (rows.has(row)) continue;
      row.close();
      this.rows.delete(key);
    }
    arrange(thread, wanted);
    for (const row of this.rows.values()) row.mark();
    this.notes();
    thread.classList.toggle("comparing", conversation.meta.comparing);
    byId("welcome").hidden = wanted.length > 0;
    this.follow();
  }

  view(node, lane) {
    const kind = node.role === "user" ? QuestionView : AnswerView;
    if (!this.views.has(node.id)) this.views.set(node.id, new kind(node, this.actions));
    const view = this.views.get(node.id);
    const { conversation } = this;
    const run = this.runOf(node);
    const last = lane !== null && conversation.leaves[lane] === node.id;
    view.until = this.actions.waitOf(node);
    view.draw(node, run);
    view.refresh({
      versions: conversation.versions(node, lane),
      idle: !this.actions.busy(conversation),
      keep: last && !this.actions.busy(conversation) ? () => this.actions.keep(lane) : null,
    });
    return view;
  }

  row(pair) {
    const key = pair.map((node) => node?.id ?? "").join();
    if (!this.rows.has(key)) this.rows.set(key, new Row());
    const row = this.rows.get(key);
    row.fill(pair.map((node, lane) => (node ? this.view(node, lane) : null)));
    row.nodes = pair;
    return row;
  }

  /** A message changed; it is drawn with the next frame. */
  grew(node) {
    if (!this.dirty.size) {
      const draw = () => requestAnimationFrame(() => this.drawDirty());
      if (this.took > QUICK) setTimeout(draw, 3 * this.took);
      else draw();
    }
    this.dirty.add(node);
  }

  drawDirty() {
    const began = performance.now();
    const dirty = [...this.dirty];
    this.dirty.clear();
    const here = dirty.filter((node) => this.views.get(node.id)?.node === node);
    for (const node of here) this.views.get(node.id).draw(node, this.runOf(node));
    for (const row of this.rows.values()) {
      if (row.nodes.some((node) => here.includes(node))) row.mark();
    }
    if (here.length) this.notes();
    this.follow();
    this.took = performance.now() - began;
  }

  /** What is read out of an answer that is over. */
  spoken(node, several) {
    const by = several ? ` by ${node.model}` : "";
    if (node.state === "failed") return `Failed${by}: ${node.error}`;
    if (node.state === "stopped") return "Stopped.";
    const view = this.views.get(node.id);
    return `Answer${by}: ${view ? textOf(view.body).text.slice(0, SPOKEN) : ""}`;
  }

  /** The question asked last, being edited. */
  editLast() {
    const path = this.conversation.path(this.conversation.leaves[0]);
    const last = path.findLast((node) => node.role === "user");
    if (last) this.views.get(last.id)?.edit();
    return Boolean(last);
  }

  /** Another version took a message's place: the focus stays on the same button. */
  focusVersion(node, by) {
    const names = ["Version before", "Next version"];
    const buttons = names.map((name) => `[aria-label="${name}"]:enabled`);
    const foot = this.views.get(node.id).element;
    const wanted = foot.querySelector(buttons[by < 0 ? 0 : 1]);
    (wanted ?? foot.querySelector(buttons.join()))?.focus();
  }

  /** The line about the sliding window, where a path passes it; and the gauge. */
  notes() {
    let most = { used: 0, exact: true };
    this.conversation.leaves.forEach((leaf, lane) => {
      const path = this.conversation.path(leaf);
      const model = this.models[lane] ?? {};
      const window = model.sliding_window ?? Infinity;
      let used = { used: 0, exact: true };
      let said = false;
      for (const node of path) {
        used = tokensAfter(node, used);
        const passes = !said && node.role === "assistant" && used.used > window;
        said ||= passes;
        this.views.get(node.id)?.setNote?.(passes ? windowNote(window) : null);
      }
      if (used.used >= most.used) most = used;
    });
    this.used = most;
    this.gauge();
  }

  /** What is typed by now counts in the gauge too. */
  drafted(tokens) {
    this.draft = tokens;
    if (this.used) this.gauge();
  }

  gauge() {
    gauge(this.used, this.draft ?? 0, this.models[0] ?? {});
  }

  /** Go to a message, and mark the words in it that were looked for. */
  find(node, words) {
    this.unmark();
    const view = this.views.get(node?.id);
    if (!view) return;
    this.following = false;
    const { element, body } = view;
    unfold(body, words);
    const ranges = rangesOf(body, words);
    for (const range of ranges) marked?.add(range);
    element.tabIndex = -1;
    element.focus({ preventScroll: true });
    const [first] = ranges;
    const inner = first?.startContainer.parentElement.closest("pre, .table"); // it scrolls too
    const go = () => {
      if (inner) {
        const [at, of] = [first, inner].map((one) => one.getBoundingClientRect());
        if (at.top < of.top || at.bottom > of.bottom) inner.scrollTop += at.top - of.top - 40;
        if (at.left < of.left || at.right > of.right) inner.scrollLeft += at.left - of.left - 40;
      }
      const rect = first?.getBoundingClientRect();
      const top = (rect?.height ? rect : element.getBoundingClientRect()).top;
      const { top: above, height } = scroller.getBoundingClientRect();
      scroller.scrollTop += top - above - Math.min(160, height / 3);
    };
    // What is off the screen has a guessed height until it is near.
    go();
    requestAnimationFrame(() => {
      go();
      requestAnimationFrame(go);
    });
  }

  unmark() {
    marked?.clear();
  }

  scrolled() {
    const top = scroller.scrollTop;
    const below = scroller.scrollHeight - scroller.clientHeight - top;
    const byHand = performance.now() - this.touched < BY_HAND;
    if (below <= 4) this.following = true;
    else if (top < this.lastTop && byHand) this.following = false; // the reader went up
    this.lastTop = top;
    toEnd.hidden = below < 80;
  }

  follow() {
    // Nothing to follow: the welcome begins at its beginning, on small screens too.
    const end = thread.childElementCount ? scroller.scrollHeight : 0;
    if (this.following) scroller.scrollTop = end;
    this.scrolled();
  }

  end() {
    this.following = true;
    this.follow();
  }
}

/** The places of some words in an element's text. */
function rangesOf(body, words) {
  const found = [];
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode() && found.length < HITS) {
    const node = walker.currentNode;
    for (const word of words) {
      for (const [start, end] of placesOf(word, node.data, HITS - found.length)) {
        const range = new Range();
        range.setStart(node, start);
        range.setEnd(node, end);
        found.push(range);
      }
    }
  }
  return found.sort((a, b) => a.compareBoundaryPoints(Range.START_TO_START, b));
}

/** Tokens of a conversation up to a message; a guess where the server has not said. */
function tokensAfter(node, { used, exact }) {
  const { prompt, tokens } = node.stats ?? {};
  if (prompt !== undefined) return { used: prompt + (tokens ?? 0), exact: true };
  const known = guessed.get(node);
  if (known?.length !== node.content.length) {
    guessed.set(node, { length: node.content.length, tokens: guess(node.content) });
  }
  return { used: used + guessed.get(node).tokens, exact: exact && !node.content };
}

function windowNote(window) {
  return (
    `This conversation is now longer than the ${plural(window, "token")} the model looks at ` +
    "directly. What is older it knows only through what it made of it on the way."
  );
}

function gauge({ used, exact }, draft, { context_length: length, sliding_window: window }) {
  byId("gauge").hidden = !length;
  if (!length) return;
  const about = exact && !draft ? "" : "about ";
  const words = `${about}${(used + draft).toLocaleString("en")} of ${plural(length, "token")}`;
  byId("gauge-text").textContent = words;
  const share = (tokens) => `${Math.min(100, (100 * tokens) / length)}%`;
  byId("gauge-fill").style.width = share(used);
  byId("gauge-draft").style.width = share(Math.min(draft, length - used));
  byId("gauge").classList.toggle("full", used + draft > 0.9 * length);
  const mark = byId("gauge-window");
  mark.hidden = !window || window >= length;
  if (!mark.hidden) mark.style.left = share(window);
  const bar = byId("gauge-bar");
  bar.setAttribute("aria-valuemax", String(length));
  bar.setAttribute("aria-valuenow", String(Math.min(used + draft, length)));
  bar.setAttribute("aria-valuetext", words);
  const passed = window && used + draft > window ? "passed" : "not reached";
  const marked = mark.hidden ? "" : `; the mark: the sliding window of ${plural(window, "token")}`;
  const typed = draft ? `, about ${draft.toLocaleString("en")} of them in the question typed now` : "";
  const where = mark.hidden ? "" : `, ${passed}`;
  byId("gauge").title = `Context used: ${words}${typed}${marked}${where}`;
}
