// A conversation is a tree of messages: another answer or an edited question is a sibling of the
// first one. A leaf names the path that is shown. Pure data; nothing here draws or stores.

import { newId } from "./dom.js";

const TITLE = 60;

/** What is stored of a conversation besides its messages. */
export function newMeta(system = "") {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    named: false, // by the reader, not after the first question
    created: now,
    updated: now,
    system,
    leaf: null,
    comparing: false,
    models: [null, null], // null: the server's first and second
    lanes: [null, null], // the leaves of the two columns
    deleted: null, // when
  };
}

export class Conversation {
  constructor(meta, nodes = []) {
    this.meta = meta;
    this.nodes = new Map();
    this.below = new Map(); // the messages after each, so that long conversations stay quick
    for (const node of [...nodes].sort(byTime)) this.take(node);
  }

  /** Have a message that was made elsewhere. */
  take(node) {
    this.nodes.set(node.id, node);
    if (!this.below.has(node.parent)) this.below.set(node.parent, []);
    const all = this.below.get(node.parent);
    all.push(node);
    all.sort(byTime);
  }

  /** Add a message after `parent` (null: as the first). */
  add(parent, role, content, more = {}) {
    // Later than its siblings even within a millisecond, so that their order is kept.
    const at = Math.max(Date.now(), ...this.children(parent).map((node) => node.at + 1));
    const node = { id: newId(), conversation: this.meta.id, parent, role, content, at, ...more };
    this.take(node);
    this.meta.updated = Date.now();
    if (role === "user" && !this.meta.title) this.meta.title = titleOf(content);
    return node;
  }

  children(parent) {
    return this.below.get(parent) ?? [];
  }

  /** The versions of a message; of an answer in a column, that column's. */
  versions(node, lane = null) {
    const all = this.children(node.parent).filter((other) => other.role === node.role);
    const own = (other) => other.lane === lane || other.lane === undefined;
    return lane === null || node.role === "user" ? all : all.filter(own);
  }

  /** The messages from the first to `leaf`. */
  path(leaf) {
    const found = [];
    const seen = new Set();
    for (let node = this.nodes.get(leaf); node && !seen.has(node.id); ) {
      seen.add(node.id);
      found.push(node);
      node = this.nodes.get(node.parent);
    }
    return found.reverse();
  }

  /** The leaf under `id` that was written last; in a column, through that column's answers. */
  latest(id, lane = null) {
    for (;;) {
      const below = this.children(id).filter(
        (node) => lane === null || node.lane === undefined || node.lane === lane,
      );
      if (!below.length) return id;
      id = below.at(-1).id;
    }
  }

  /** What the server is asked with, and what a file of the conversation holds. */
  messages(leaf) {
    const system = this.meta.system.trim() ? [{ role: "system", content: this.meta.system }] : [];
    return [...system, ...this.path(leaf).map(({ role, content }) => ({ role, content }))];
  }

  get leaf() {
    const { leaf } = this.meta;
    if (leaf !== null && this.nodes.has(leaf)) return leaf;
    const all = [...this.nodes.values()].sort((a, b) => a.at - b.at);
    return all.at(-1)?.id ?? null;
  }

  /** The leaves shown: one, or each column's. */
  get leaves() {
    if (!this.meta.comparing) return [this.leaf];
    return this.meta.lanes.map((leaf) => (this.nodes.has(leaf) ? leaf : this.leaf));
  }

  /** The messages shown, row by row: one, or a pair where the columns differ. */
  get rows() {
    const [a, b = a] = this.leaves.map((leaf) => this.path(leaf));
    return Array.from({ length: Math.max(a.length, b.length) }, (_, index) => {
      const pair = [a[index], b[index]];
      const asked = pair.every((node) => node?.role === "user");
      const same = pair[0] === pair[1] || (asked && pair[0].content === pair[1].content);
      return same ? [pair[0]] : pair;
    });
  }

  /** Show `leaf`, in a column or in the only one. */
  show(leaf, lane = 0) {
    if (this.meta.comparing) this.meta.lanes = this.leaves.with(lane, leaf);
    if (!this.meta.comparing || lane === 0) this.meta.leaf = leaf;
  }

  /** Show the versions that have this message; true where others were shown. */
  reveal(node) {
    const lanes = this.leaves.map((leaf, lane) => lane);
    if (lanes.some((lane) => this.path(this.leaves[lane]).includes(node))) return false;
    for (const lane of lanes) {
      if (node.lane !== undefined && lanes.length > 1 && node.lane !== lane) continue;
      this.show(this.latest(node.id, this.meta.comparing ? lane : null), lane);
    }
    return true;
  }

  /** Begin or end comparing; beginning again where it ended finds both columns as they were. */
  compare(on) {
    if (on === this.meta.comparing) return;
    const leaf = this.leaf;
    this.meta.comparing = on;
    const known = this.meta.lanes.every((lane) => this.nodes.has(lane));
    if (on && !(known && this.meta.lanes.includes(leaf))) this.meta.lanes = [leaf, leaf];
  }
}

function byTime(a, b) {
  return a.at - b.at || (a.id < b.id ? -1 : 1);
}

export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  return line.length > TITLE ? `${line.slice(0, TITLE - 1).trimEnd()}…` : line;
}
