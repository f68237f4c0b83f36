// What can be done with a conversation: ask, answer again, edit, switch versions, stop.

import { announce } from "./dom.js";
import { Run } from "./run.js";
import { sampling } from "./settings.js";

export class Chat {
  /**
   * `changed(conversation)`: its messages or their order changed; `grew(node)`: one message did;
   * `ended(conversation, answers)`: the last of them is over; `lost()`: the server is gone;
   * `models()`: the server's.
   */
  constructor(store, { changed, grew, ended, lost, models }) {
    this.store = store;
    this.changed = changed;
    this.grew = grew;
    this.ended = ended;
    this.lost = lost;
    this.models = models;
    this.runs = new Map(); // by message
    this.waits = new Map(); // until when a failed message was asked to wait, by its id
  }

  /** The models of the columns: the chosen ones while the server has them. */
  modelsOf(conversation) {
    const all = this.models();
    return conversation.meta.models.map((id, lane) => {
      return all.find((model) => model.id === id) ?? all[lane] ?? all[0];
    });
  }

  busy(conversation) {
    const own = ({ node }) => node.conversation === conversation.meta.id;
    return [...this.runs.values()].some(own);
  }

  growing() {
    return [...this.runs.values()].map(({ node }) => node);
  }

  /** Ask at the end of what is shown. */
  ask(conversation, text) {
    return this.askAfter(conversation, conversation.leaves, text);
  }

  /** Ask after other messages than the last ones: a branch of its own. */
  edit(conversation, node, text) {
    const paths = conversation.leaves.map((leaf) => conversation.path(leaf));
    const at = Math.max(...paths.map((path) => path.indexOf(node)));
    const parents = paths.map((path) => (at === 0 ? null : (path[at - 1] ?? path.at(-1)).id));
    return this.askAfter(conversation, parents, text);
  }

  askAfter(conversation, parents, text) {
    if (this.busy(conversation) || !this.models().length) return false;
    const asked = new Map();
    for (const parent of parents) {
      if (!asked.has(parent)) asked.set(parent, conversation.add(parent, "user", text));
    }
    const answers = parents.map((parent, lane) => {
      return this.newAnswer(conversation, asked.get(parent).id, lane);
    });
    this.begin(conversation, answers, [...asked.values()], sampling());
    return true;
  }

  newAnswer(conversation, parent, lane) {
    const { comparing } = conversation.meta;
    const answer = conversation.add(parent, "assistant", "", comparing ? { lane } : {});
    conversation.show(answer.id, lane);
    return answer;
  }

  /**
   * Another answer to the same question; one that failed before its first word is replaced. What
   * was whole is drawn anew; what was not is asked for as it was.
   */
  retry(conversation, node) {
    if (this.busy(conversation) || !this.models().length) return;
    const lane = this.laneOf(conversation, node);
    const same = this.modelsOf(conversation)[lane].id === node.model;
    const whole = Boolean(node.content) && ["done", "stopped"].includes(node.state);
    const seed = whole ? undefined : node.stats?.seed;
    const empty = !node.content && node.state !== "done";
    const answer = empty ? node : this.newAnswer(conversation, node.parent, lane);
    this.begin(conversation, [answer], [], sampling({ another: same && whole, seed }));
  }

  /** Was the answer cut off, and does nothing come after it? Then it can be gone on with. */
  cutOff(conversation, node) {
    if (!node.content || node.elsewhere || this.runs.has(node)) return false;
    const early = ["stopped", "failed", "partial"].includes(node.state) || node.finish === "length";
    return early && !conversation.children(node.id).length;
  }

  /** Go on with an answer that was cut off: by its model and drawn as it was, where that can be. */
  goOn(conversation, node) {
    if (this.busy(conversation) || !this.models().length) return;
    const { seed, temperature, top_p, min_p, tokens = 0 } = node.stats ?? {};
    const chosen = sampling({ seed });
    for (const [name, value] of Object.entries({ temperature, top_p, min_p })) {
      if (value !== undefined) chosen[name] = value;
    }
    this.begin(conversation, [node], [], chosen, { before: tokens });
  }

  laneOf(conversation, node) {
    const inLane = (leaf) => conversation.path(leaf).includes(node);
    return Math.max(0, conversation.leaves.findIndex(inLane));
  }

  /**
   * `chosen`: one way of sampling and one seed, for both columns. `goesOn`: { before }, the tokens
   * that there are of the answer, where it is gone on with.
   */
  begin(conversation, answers, asked, chosen, goesOn = null) {
    const models = this.modelsOf(conversation);
    for (const node of answers) {
      const own = goesOn && this.models().find(({ id }) => id === node.model);
      node.model = (own ?? models[this.laneOf(conversation, node)]).id;
      const { seed, temperature, top_p, min_p } = chosen;
      node.stats = { seed, temperature, top_p, min_p, ...goesOn };
      delete node.finish;
      this.waits.delete(node.id);
      const run = new Run(node, {
        grew: this.grew,
        save: () => this.store.putNodes(conversation.meta.id, [node]),
      });
      this.runs.set(node, run);
    }
    // Deleted in another tab in the middle of an answer, it is kept anew where one goes on with it.
    const changed = conversation.erased ? [...conversation.nodes.values()] : [...asked, ...answers];
    conversation.erased = false;
    const kept = this.store.put(conversation.meta, changed);
    this.changed(conversation);
    announce(goesOn ? "Going on." : "Answering.");
    for (const node of answers) {
      const messages = conversation.messages(goesOn ? node.id : node.parent);
      const body = { model: node.model, messages, ...chosen };
      if (goesOn) body.continue_final_message = true;
      const run = this.runs.get(node);
      run.start(body, kept).then(() => this.over(conversation, node, answers));
    }
  }

  over(conversation, node, answers) {
    const run = this.runs.get(node);
    this.runs.delete(node);
    if (run.wait) this.waits.set(node.id, performance.now() + 1000 * run.wait);
    if (run.gone) this.lost();
    this.changed(conversation);
    if (!this.busy(conversation)) this.ended(conversation, answers);
  }

  stop(conversation) {
    for (const run of this.runs.values()) {
      if (run.node.conversation === conversation.meta.id) run.stop();
    }
  }

  /** Show the version before or after the one shown; returns it. */
  step(conversation, node, by) {
    const { comparing } = conversation.meta;
    const lane = this.laneOf(conversation, node);
    let shown = node;
    if (node.role === "assistant") {
      const versions = conversation.versions(node, comparing ? lane : null);
      const next = versions[versions.indexOf(node) + by];
      shown = next ?? node;
      if (next) conversation.show(conversation.latest(next.id, comparing ? lane : null), lane);
    } else {
      // Both columns were asked it, so both change.
      const paths = conversation.leaves.map((leaf) => conversation.path(leaf));
      const at = paths[lane].indexOf(node);
      paths.forEach((path, one) => {
        const versions = path[at] ? conversation.versions(path[at]) : [];
        const next = versions[versions.indexOf(path[at]) + by];
        if (next) conversation.show(conversation.latest(next.id, comparing ? one : null), one);
        if (one === lane) shown = next ?? node;
      });
    }
    this.store.put(conversation.meta);
    this.changed(conversation);
    return shown;
  }

  /** Go on with one column's answer alone. */
  keep(conversation, lane) {
    const { meta } = conversation;
    meta.leaf = conversation.leaves[lane];
    meta.models = [this.modelsOf(conversation)[lane].id, meta.models[1 - lane]];
    conversation.compare(false);
    this.store.put(meta);
    this.changed(conversation);
  }
}
