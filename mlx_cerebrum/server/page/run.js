// One answer on its way: asks the server, lets the message grow, keeps it as it does.

import { ApiError, answer } from "./api.js";

const SAVE_EVERY = 400; // milliseconds

const LEAVING = 2000; // after the page was told to go, which ends every connection

let leaving = -Infinity; // when it was told so
addEventListener("beforeunload", () => (leaving = performance.now()));

/**
 * `node` is the answer's message, empty as yet or one that is gone on with. `grew(node, run)` is
 * called whenever something about it changed; `save(node)` keeps it.
 */
export class Run {
  constructor(node, { grew, save }) {
    this.node = node;
    this.grew = () => grew(node, this);
    this.save = () => save(node);
    this.controller = new AbortController();
    this.reading = null; // [done, total] of the prompt's tokens
    this.loading = null; // and of the model's bytes, where it was at rest
    this.pieces = 0; // of this run
    this.before = node.stats?.before; // tokens of the runs before this one
    this.timer = null;
    node.state = "partial";
    delete node.error;
  }

  /** Resolves when the answer is over, however it ended; never rejects. `kept`: what to save after. */
  async start(body, kept) {
    const node = this.node;
    this.began = performance.now();
    try {
      const { finish, usage } = await answer(body, {
        signal: this.controller.signal,
        onComment: (what, done, total) => {
          this[what] = [done, total];
          this.grew();
        },
        onText: (text) => this.take(text),
      });
      this.count(usage);
      node.state = "done";
      node.finish = finish;
    } catch (error) {
      // Then it is no failure; and where the page stays after all, it is told a little later.
      const left = leaving + LEAVING - performance.now();
      if (left > 0) await new Promise((resolve) => setTimeout(resolve, left));
      this.count(null);
      if (error.name === "AbortError") {
        node.state = "stopped";
      } else {
        node.state = "failed";
        const known = error instanceof ApiError;
        node.error = known ? error.message : `The page failed: ${error.message}`;
        this.wait = known ? error.wait : null;
        this.gone = known && error.gone;
      }
    }
    clearTimeout(this.timer);
    await kept; // the question goes first
    await this.save();
  }

  stop() {
    this.controller.abort();
  }

  take(text) {
    this.ended = performance.now();
    this.first ??= this.ended;
    this.node.content += text;
    this.pieces += 1;
    this.count(null);
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.save();
    }, SAVE_EVERY);
    this.grew();
  }

  /** Tokens and times; while it runs, and where it was stopped, a piece counts as a token. */
  count(usage) {
    const stats = (this.node.stats ??= {});
    const tokens = usage?.completion_tokens ?? this.pieces;
    const read = usage?.prompt_tokens ?? this.reading?.[1];
    const before = this.before ?? 0; // they are part of the prompt that is read now
    if (read !== undefined) stats.prompt = Math.max(0, read - before);
    stats.tokens = before + tokens;
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (cached !== undefined && cached !== null) stats.cached = cached;
    if (this.first === undefined) return;
    stats.first = (this.first - this.began) / 1000;
    const seconds = (this.ended - this.first) / 1000;
    // The first token is the prompt's time; of a few milliseconds there is no speed to tell.
    if (tokens > 1 && seconds > 0.05) stats.speed = (tokens - 1) / seconds;
  }
}
