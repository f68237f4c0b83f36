// Where questions are typed, and the keys that work everywhere.

import { byId } from "./dom.js";
import { fit } from "./messages.js";

const DRAFT = "cerebrum.draft.";

const box = byId("question");
let place = ""; // whose draft this is

function keep(text) {
  try {
    if (text) sessionStorage.setItem(DRAFT + place, text);
    else sessionStorage.removeItem(DRAFT + place);
  } catch {
    // it is still in the field
  }
}

export function setQuestion(text) {
  box.value = text;
  keep(text);
  fit(box);
}

/** Go to another conversation's draft. */
export function useDraft(id) {
  place = id;
  let draft = "";
  try {
    draft = sessionStorage.getItem(DRAFT + id) ?? "";
  } catch {
    // none, then
  }
  box.value = draft;
  fit(box);
}

/** Show what the composer can do now. */
export function setBusy(busy) {
  const inside = byId("composer").contains(document.activeElement);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("hint").textContent = busy ? "Esc stops" : "Enter sends · Shift+Enter: new line";
  if (inside && document.activeElement !== box) box.focus();
}

/** On a touch screen the focus would bring up the keyboard. */
export function focusQuestion() {
  if (matchMedia("(pointer: fine)").matches) box.focus();
}

/** `actions`: send(text) (true where it was taken), stop, editLast. */
export function setUpComposer({ send, stop, editLast }) {
  const submit = () => {
    if (box.value.trim() && send(box.value)) setQuestion("");
  };
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("stop").addEventListener("click", stop);
  box.addEventListener("input", () => {
    keep(box.value);
    fit(box);
  });
  box.addEventListener("keydown", (event) => {
    // While characters are being composed, Enter and the arrows belong to the input method.
    if (event.isComposing || event.keyCode === 229) return;
    const plain = !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.altKey;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && plain && !box.value && editLast()) {
      event.preventDefault();
    }
  });
  addEventListener("resize", () => fit(box));
}

/** `actions` by name; keys do nothing of this while a dialog is open. */
export function setUpKeys({ stop, fresh, compare, settings, list, help }) {
  const alt = { KeyN: fresh, KeyC: compare, KeyS: settings, KeyL: list };
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest("input, textarea, select");
    const command = event.ctrlKey || event.metaKey;
    let act = null;
    if (event.key === "Escape") act = stop;
    else if (event.altKey && !command && !event.shiftKey) act = alt[event.code];
    else if (command && event.key === "/") act = help;
    else if (!typing && !command && event.key === "?") act = help;
    else if (!typing && !command && event.key === "/") act = () => box.focus();
    if (!act) return;
    event.preventDefault();
    act();
  });
}
