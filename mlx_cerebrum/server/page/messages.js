// One message on the screen: a question that can be edited, or an answer that may still grow.

import { partsOf, sizeOf, withFiles } from "./attached.js";
import { paceText } from "./card.js";
import { fileChip, questionParts } from "./chips.js";
import { composing, copyFrom, h, iconButton, plural, touch } from "./dom.js";
import { Rendering } from "./markdown.js";

const STATS_EVERY = 500; // milliseconds between two changes of the figures while they run

/** ‹ 1/2 ›, where there is more than one version. */
function versionButtons(versions, node, step) {
  const at = versions.indexOf(node);
  if (versions.length < 2) return [];
  const count = `${at + 1}/${versions.length}`;
  return [
    iconButton("back", "Version before", () => step(-1), { disabled: at === 0 }),
    h("span", { class: "count", "aria-label": `Version ${at + 1} of ${versions.length}` }, count),
    iconButton("next", "Next version", () => step(1), { disabled: at === versions.length - 1 }),
  ];
}

/** Replace a footer's buttons, keeping the focus on the one of the same name. */
function refill(foot, children) {
  const inside = foot.contains(document.activeElement);
  const focused = inside ? document.activeElement.getAttribute("aria-label") : null;
  foot.replaceChildren(...children);
  if (!inside) return;
  const all = [...foot.querySelectorAll("button:enabled")];
  (all.find((button) => button.getAttribute("aria-label") === focused) ?? all[0])?.focus();
}

export class QuestionView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.body = h("div", { class: "body" });
    this.foot = h("footer");
    this.element = h("article", { class: "question", "aria-label": "Question" });
    // Headings, so that a screen reader can go from message to message.
    this.element.append(h("h2", { class: "hidden-text" }, "Question"), this.body, this.foot);
  }

  draw(node) {
    this.node = node;
    if (this.drawn === node.content) return;
    this.drawn = node.content;
    this.body.replaceChildren(...questionParts(node.content));
  }

  refresh({ versions, idle }) {
    const { node, actions } = this;
    const shown = `${versions.indexOf(node)} ${versions.length}`;
    if (shown !== this.shown) {
      this.editButton = iconButton("pen", "Edit", () => this.edit());
      refill(this.foot, [
        ...versionButtons(versions, node, (by) => actions.step(node, by)),
        this.editButton,
        iconButton("copy", "Copy", (event) => copyFrom(event.currentTarget, node.content)),
      ]);
    }
    this.shown = shown;
    this.editButton.disabled = !idle;
  }

  edit() {
    if (this.form) return this.form.querySelector("textarea").focus();
    const box = h("textarea", { "aria-label": "Edited question", rows: 1, dir: "auto" });
    const { text, files } = partsOf(this.node.content);
    box.value = text;
    const kept = new Set(files);
    const chips = h("div", { class: "chips" });
    for (const file of files) {
      const chip = fileChip(file, () => {
        kept.delete(file);
        chip.remove();
        box.focus();
      });
      chips.append(chip);
    }
    const cancel = () => {
      this.close();
      this.foot.querySelector("[aria-label=Edit]")?.focus();
    };
    const send = () => {
      const asked = withFiles(box.value, [...kept]);
      if (!asked.trim() || !this.actions.edit(this.node, asked)) return;
      this.close();
    };
    const buttons = h("div", { class: "buttons" });
    buttons.append(
      h("button", { type: "button", class: "quiet", onclick: cancel }, "Cancel"),
      h("button", { type: "submit", class: "main" }, "Ask again"),
    );
    this.form = h("form", { class: "edit" }, box, ...(files.length ? [chips] : []), buttons);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    box.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !touch()) {
        event.preventDefault();
        send();
      }
    });
    box.addEventListener("input", () => fit(box));
    this.element.classList.add("editing");
    this.element.prepend(this.form);
    fit(box);
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }

  close() {
    this.form.remove();
    this.form = null;
    this.element.classList.remove("editing");
  }
}

/** As tall as its text, up to what the style sheet allows. */
export function fit(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
}

export class AnswerView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.who = h("h2", { class: "who" });
    this.body = h("div", { class: "markdown" });
    this.rendering = new Rendering(this.body);
    this.state = h("div", { class: "state" });
    this.buttons = h("span", { class: "buttons" });
    this.stats = h("span", { class: "stats" });
    this.note = h("p", { class: "note", hidden: true });
    this.element = h("article", { class: "answer" });
    const foot = h("footer", {}, this.buttons, this.stats);
    this.element.append(this.who, this.body, this.state, foot, this.note);
  }

  /** Show what there is by now; `run` is there while the answer grows. */
  draw(node, run) {
    this.node = node;
    this.who.textContent = node.model || "Answer";
    this.element.setAttribute("aria-label", node.model ? `Answer by ${node.model}` : "Answer");
    this.element.classList.toggle("growing", Boolean(run));
    this.element.setAttribute("aria-busy", String(Boolean(run)));
    this.rendering.update(node.content);
    this.drawState(run);
    const now = performance.now();
    if (run && now - (this.drawnAt ?? -Infinity) < STATS_EVERY) return;
    this.drawnAt = run ? now : -Infinity;
    const [short, long] = statsText(node);
    this.stats.textContent = short;
    this.stats.title = long;
  }

  drawState(run) {
    const { node } = this;
    if (run && !run.pieces) {
      const [done, total] = run.reading ?? run.loading ?? [0, 0];
      const first = node.content ? "Going on" : "Waiting for the first word";
      const model = () => `Loading the model, ${sizeOf(done)} of ${sizeOf(total)}`;
      const told = () => (run.reading ? `Reading the prompt ${done}/${total}` : model());
      const words = total ? told() : first;
      if (this.waiting === words) return;
      this.waiting = words;
      const bar = total ? h("progress", { max: total, value: done, "aria-label": words }) : null;
      this.state.replaceChildren(h("p", { class: "waiting" }, words), ...(bar ? [bar] : []));
      return;
    }
    this.waiting = null;
    const goOn = !run && this.actions.cutOff(node);
    const said = [Boolean(run), node.state, node.error, node.finish, node.elsewhere, goOn].join();
    if (this.said === said) return;
    this.said = said;
    clearInterval(this.counting);
    this.state.replaceChildren();
    if (run) return;
    if (node.state === "failed") this.drawError(node.error ?? "That failed.");
    const partial = node.elsewhere
      ? "Still coming, in another tab."
      : "Interrupted: this is what had come by then.";
    const length = node.finish === "length" ? "Ended at the longest answer allowed." : null;
    const words = { stopped: "Stopped.", partial, done: length }[node.state];
    if (words) this.state.append(h("p", { class: "ended" }, words));
    if (!goOn) return;
    const button = h("button", { type: "button", class: "again" }, "Continue the answer");
    button.addEventListener("click", () => this.actions.goOn(node));
    this.state.lastElementChild.append(" ", button);
  }

  drawError(message) {
    const again = h("button", { type: "button", class: "again" }, "Try again");
    again.addEventListener("click", () => this.actions.retry(this.node));
    const line = h("span", {}, message);
    this.state.append(h("p", { class: "error" }, line, " ", again));
    const left = () => Math.ceil(((this.until ?? 0) - performance.now()) / 1000);
    if (left() <= 0) return;
    line.textContent = `${message}; the server asks to wait ${plural(left(), "second")}.`;
    const show = () => {
      again.disabled = left() > 0;
      again.textContent = left() > 0 ? `Try again in ${left()} s` : "Try again";
      if (left() <= 0) clearInterval(this.counting);
    };
    show();
    this.counting = setInterval(show, 1000);
  }

  refresh({ versions, idle, keep }) {
    const { node, actions } = this;
    const shown = `${versions.indexOf(node)} ${versions.length} ${Boolean(keep)}`;
    if (shown !== this.shown) {
      const goOn = { type: "button", class: "keep", onclick: keep };
      this.retryButton = iconButton("retry", "Another answer", () => actions.retry(node));
      refill(this.buttons, [
        ...versionButtons(versions, node, (by) => actions.step(node, by)),
        iconButton("copy", "Copy", (event) => copyFrom(event.currentTarget, node.content)),
        this.retryButton,
        ...(keep ? [h("button", goOn, "Continue with this")] : []),
      ]);
    }
    this.shown = shown;
    this.retryButton.disabled = !idle;
  }

  /** A line under the answer, or none. */
  setNote(text) {
    if (text === (this.noted ?? null)) return;
    this.noted = text;
    this.note.hidden = text === null;
    this.note.textContent = text ?? "";
  }
}

function statsText({ stats, model }) {
  if (!stats) return ["", ""];
  const { speed, first, tokens, prompt, cached, temperature, seed } = stats;
  const short = [
    speed !== undefined && `${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`,
    first !== undefined && `first after ${first.toFixed(2)} s`,
    tokens > 0 && plural(tokens, "token"),
  ];
  const long = [
    model,
    speed !== undefined && paceText(speed),
    prompt !== undefined && `prompt: ${plural(prompt, "token")}`,
    cached > 0 && `${cached.toLocaleString("en")} of them read before`,
    temperature !== undefined && `temperature ${temperature}`,
    seed !== undefined && temperature !== 0 && `seed ${seed}`,
  ];
  return [short.filter(Boolean).join(" · "), long.filter(Boolean).join(", ")];
}
