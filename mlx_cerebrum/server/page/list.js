// The list of conversations, and the line at the bottom that offers to undo.

import { byId, h, iconButton } from "./dom.js";

const UNDO = 10_000; // milliseconds

const list = byId("conversations");
let toastTimer = null;

/** A line at the bottom for a while, with a button where there is something to do about it. */
export function toast(text, button = null, ended = () => {}) {
  clearTimeout(toastTimer);
  const box = byId("toast");
  const close = () => {
    clearTimeout(toastTimer);
    box.replaceChildren();
  };
  const act = () => {
    close();
    button.act();
  };
  const parts = [h("span", {}, text)];
  if (button) parts.push(h("button", { type: "button", class: "quiet", onclick: act }, button.name));
  box.replaceChildren(...parts);
  toastTimer = setTimeout(() => {
    close();
    ended();
  }, UNDO);
}

/** Draw the list. `actions`: open, rename, save, remove; each gets a conversation's meta. */
export function drawList(metas, current, actions) {
  if (list.querySelector("input")) return; // a name is being typed
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
  const open = h("button", { type: "button", class: "open", title: name }, name);
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
  const finish = (keep) => {
    if (over) return;
    over = true;
    box.remove();
    actions.rename(meta, keep && box.value.trim() ? box.value.trim() : null);
    list.querySelector(`li[data-id="${CSS.escape(meta.id)}"] .open`)?.focus();
  };
  box.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    }
  });
  box.addEventListener("blur", () => finish(true));
  line.replaceChildren(box);
  box.focus();
  box.select();
}
