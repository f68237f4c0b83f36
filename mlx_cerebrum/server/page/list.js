// The list of conversations, and the line at the bottom that offers to undo.

import { byId, composing, h, iconButton } from "./dom.js";

const UNDO = 10_000; // milliseconds
const LINES = 3; // at the bottom at once; one more ends the first
const TELL_AGAIN = 60_000; // and between two words about what can't be kept
const FULL =
  "This browser's storage is full: what is new lasts until the page is closed. " +
  "To make room, back up and delete a conversation.";
const NOT_KEPT =
  "This browser does not keep conversations now: they last until the page is closed.";

const list = byId("conversations");
const shown = new Map(); // lines at the bottom, oldest first -> what ends them
let toldAt = -Infinity;
let drawn = null;

/** A line at the bottom for a while, with a button where there is something to do about it. */
export function toast(text, button = null, ended = () => {}) {
  const box = byId("toast");
  const line = h("div", { class: "line" }, h("span", {}, text));
  const close = () => {
    clearTimeout(timer);
    shown.delete(line);
    line.remove();
  };
  const end = () => {
    close();
    ended();
  };
  // Not while someone is about to press a button here: those above it would move.
  const look = () => {
    if (box.matches(":hover, :focus-within")) timer = setTimeout(look, UNDO);
    else end();
  };
  let timer = setTimeout(look, UNDO);
  if (button) {
    const act = () => {
      close();
      button.act();
    };
    line.append(h("button", { type: "button", class: "quiet", onclick: act }, button.name));
  }
  shown.set(line, end);
  box.prepend(line); // on top, so that no other moves
  if (shown.size <= LINES) return;
  const old = [...shown.keys()].filter((one) => one !== line && !one.matches(":hover, :focus-within"));
  shown.get(old.find((one) => !one.querySelector("button")) ?? old[0])?.();
}

/** Say that conversations can't be kept, once in a while. */
export function tellNotKept(error) {
  if (performance.now() - toldAt < TELL_AGAIN) return;
  toldAt = performance.now();
  toast(error?.name === "QuotaExceededError" ? FULL : NOT_KEPT);
}

/** Draw the list. `actions`: open, rename, save, remove; each gets a conversation's meta. */
export function drawList(metas, current, actions) {
  if (list.querySelector("input")) return; // a name is being typed
  // As it was: a list that is made anew between pressing and letting go loses the click.
  const now = JSON.stringify([current, metas.map(({ id, title }) => [id, title])]);
  if (now === drawn) return;
  drawn = now;
  const focused = document.activeElement?.closest?.("li")?.dataset.id;
  const label = document.activeElement?.getAttribute("aria-label");
  list.replaceChildren(...metas.map((meta) => item(meta, meta.id === current, actions)));
  byId("no-conversations").hidden = metas.length > 0;
  if (focused === undefined) return;
  const again = list.querySelector(`li[data-id="${CSS.escape(focused)}"]`);
  const buttons = [...(again ?? list).querySelectorAll("button")];
  const same = buttons.find((button) => button.getAttribute("aria-label") === label);
  (same ?? buttons[0])?.focus();
}

function item(meta, current, actions) {
  const name = meta.title || "Untitled";
  const open = h("button", { type: "button", class: "open", title: name, dir: "auto" }, name);
  if (current) open.setAttribute("aria-current", "page");
  const line = h("li", { "data-id": meta.id, class: current ? "current" : null }, open);
  open.addEventListener("click", () => actions.open(meta));
  const tools = h("span", { class: "tools" });
  tools.append(
    iconButton("pen", `Rename ${name}`, () => rename(line, meta, actions)),
    iconButton("save", `Export ${name}`, () => actions.save(meta)),
    iconButton("bin", `Delete ${name}`, () => actions.remove(meta)),
  );
  line.append(tools);
  return line;
}

function rename(line, meta, actions) {
  const box = h("input", { type: "text", "aria-label": "Name", maxlength: 200 });
  box.value = meta.title;
  let over = false;
  const finish = async (keep, key = false) => {
    if (over) return;
    over = true;
    box.remove();
    drawn = null;
    await actions.rename(meta, keep && box.value.trim() ? box.value.trim() : null);
    if (key) list.querySelector(`li[data-id="${CSS.escape(meta.id)}"] .open`)?.focus();
  };
  box.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (event.key === "Enter") finish(true, true);
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false, true);
    }
  });
  box.addEventListener("blur", () => finish(true));
  line.replaceChildren(box);
  box.focus();
  box.select();
}
