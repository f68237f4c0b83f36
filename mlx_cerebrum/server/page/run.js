// One answer on its way: asks the server, lets the message grow, keeps it as it does.

import { ApiError, answer } from "./api.js";

const SAVE_EVERY = 400; // milliseconds

/**
 * `node` is the answer's message, empty as yet. `grew(node, run)` is called whenever something
 * about it changed; `save(node)` keeps it.
 */
export class Run {
  constructor(node, { grew, save }) {
    this.node = node;
    this.grew = () => grew(node, this);
    this.save = () => save(node);
    this.controller = new AbortController();
    this.reading = null; // [done, total] of the prompt's tokens
    this.pieces = 0;
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
        onReading: (done, total) => {
          this.reading = [done, total];
          this.grew();
        },
        onText: (text) => this.take(text),
      });
      this.count(usage);
      node.state = "done";
      node.finish = finish;
    } catch (error) {
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
    const prompt = usage?.prompt_tokens ?? this.reading?.[1];
    if (prompt !== undefined) stats.prompt = prompt;
    stats.tokens = tokens;
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (cached !== undefined && cached !== null) stats.cached = cached;
    if (this.first === undefined) return;
    stats.first = (this.first - this.began) / 1000;
    const seconds = (this.ended - this.first) / 1000;
    // The first token is the prompt's time; of a few milliseconds there is no speed to tell.
    if (tokens > 1 && seconds > 0.05) stats.speed = (tokens - 1) / seconds;
  }
}
