// Which of two answers was the better one, by the reader: kept in this browser, told per model.

import { h, plural } from "./dom.js";

const KEY = "cerebrum.votes";
const MOST = 5000; // votes; the oldest go first
const CHOICES = [-1, 0, 1]; // the left one, both alike, the right one

let held = load(); // [left model, right model, choice] by the two answers
const listeners = new Set();

function load() {
  let found = null;
  try {
    found = JSON.parse(localStorage.getItem(KEY));
  } catch {
    // unreadable or switched off: none yet
  }
  const sound = ([, vote]) =>
    Array.isArray(vote) &&
    vote.length === 3 &&
    vote.slice(0, 2).every((name) => typeof name === "string") &&
    CHOICES.includes(vote[2]);
  return new Map(Object.entries(found ?? {}).filter(sound));
}

function keep() {
  while (held.size > MOST) held.delete(held.keys().next().value);
  try {
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(held)));
  } catch {
    // they hold until the page is closed
  }
  for (const changed of listeners) changed();
}

addEventListener("storage", (event) => {
  if (event.key !== KEY) return;
  held = load(); // voted in another tab
  for (const changed of listeners) changed();
});

/** `changed()` is called when a vote was given, until what is returned is called. */
export function onVotes(changed) {
  listeners.add(changed);
  return () => listeners.delete(changed);
}

const keyOf = (pair) => pair.map(({ id }) => id).join(" ");

export function voteOf(pair) {
  return held.get(keyOf(pair))?.[2] ?? null;
}

/** Vote on a pair of answers; null takes the vote back. */
export function vote(pair, choice) {
  held.delete(keyOf(pair));
  if (choice !== null) held.set(keyOf(pair), [pair[0].model, pair[1].model, choice]);
  keep();
}

/** How one model did against another: { better, worse, even }. */
export function tally(model, other) {
  const counts = { better: 0, worse: 0, even: 0 };
  for (const [left, right, choice] of held.values()) {
    if (left === right || ![left, right].includes(model) || ![left, right].includes(other)) continue;
    const own = left === model ? -choice : choice;
    counts[own > 0 ? "better" : own < 0 ? "worse" : "even"] += 1;
  }
  return counts;
}

/** The models that one was voted on against. */
export function rivals(model) {
  const found = new Set();
  for (const [left, right] of held.values()) {
    if (left === model && right !== model) found.add(right);
    if (right === model && left !== model) found.add(left);
  }
  return [...found].sort();
}

export function forgetVotes() {
  const before = held;
  held = new Map();
  keep();
  return () => {
    held = new Map([...before, ...held]);
    keep();
  };
}

/** The tally of two models in words. */
export function tallyText(a, b) {
  const { better, worse, even } = tally(a, b);
  const count = better + worse + even;
  if (!count) return "";
  return `Of ${plural(count, "vote")}: ${a} ${better}, ${b} ${worse}, as good ${even}.`;
}

/** The buttons to vote with, and the tally, for a pair of answers. */
export class VoteButtons {
  constructor() {
    this.buttons = CHOICES.map((choice) => {
      const act = () => vote(this.pair, voteOf(this.pair) === choice ? null : choice);
      return h("button", { type: "button", class: "vote", onclick: act });
    });
    this.said = h("span", { class: "muted", role: "status" });
    const group = { class: "vote-group", role: "group", "aria-label": "Which answer is better?" };
    this.element = h("div", { class: "votes" }, h("div", group, ...this.buttons), this.said);
    this.close = onVotes(() => this.draw());
  }

  /** For these two answers, or null where there is nothing to choose between. */
  show(pair) {
    this.pair = pair;
    this.draw();
  }

  draw() {
    this.element.hidden = !this.pair;
    if (!this.pair) return;
    const now = voteOf(this.pair);
    const [left, right] = this.pair.map(({ model }) => model);
    const names = [`${left} is better`, "As good", `${right} is better`]; // on a phone none is left
    this.buttons.forEach((button, index) => {
      if (button.textContent !== names[index]) button.textContent = names[index];
      button.setAttribute("aria-pressed", String(CHOICES[index] === now));
    });
    const text = now === null ? "" : tallyText(left, right);
    if (this.said.textContent !== text) this.said.textContent = text;
  }
}
