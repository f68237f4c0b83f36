// What is on the server's shelf besides the models that answer, and having one of it loaded.

import { loadFromShelf, shelf as ask } from "./api.js";

const AGAIN = 700; // milliseconds between two looks while one is loading

/**
 * `rows`: the shelf's models, none where the server has no shelf; `machine`: its name, or null.
 * Each of `changed` is called when that may be other; `news(row)` while a model is loading,
 * `arrived(row)` when it answers, `failed(line)` when it does not.
 */
export class Shelf {
  constructor({ arrived, failed, news }) {
    this.arrived = arrived;
    this.failed = failed;
    this.news = news;
    this.changed = [];
    this.rows = [];
    this.machine = null;
    this.wanted = new Set(); // on their way, whoever asked
    this.timer = null;
    this.none = false;
  }

  /** Ask what there is; again while something is on its way. */
  async look() {
    if (this.none) return;
    clearTimeout(this.timer);
    let found;
    try {
      found = await ask();
    } catch {
      if (this.wanted.size) this.timer = setTimeout(() => this.look(), AGAIN);
      return; // the page says elsewhere that nothing answers
    }
    this.none = found === null;
    this.rows = found?.models ?? [];
    this.machine = found?.machine ?? null;
    for (const { id, state } of this.rows) if (state === "loading") this.wanted.add(id);
    await this.settle();
    for (const changed of this.changed) changed();
    clearTimeout(this.timer);
    if (this.wanted.size) this.timer = setTimeout(() => this.look(), AGAIN);
  }

  /** Tell of what was on its way and is there, or will not be. */
  async settle() {
    for (const id of [...this.wanted]) {
      const row = this.rows.find((one) => one.id === id);
      if (row?.state === "loading") {
        this.news(row);
        continue;
      }
      this.wanted.delete(id);
      if (["loaded", "at rest"].includes(row?.state)) await this.arrived(row);
      else this.failed(row?.why_not ?? `${id} could not be loaded.`);
    }
  }

  async load(id) {
    if (this.wanted.has(id)) return;
    try {
      await loadFromShelf(id);
    } catch (error) {
      this.failed(error.message);
      await this.look();
      return;
    }
    this.wanted.add(id);
    await this.look();
  }
}
