// Where questions are typed, and the keys that work everywhere.

import { byId, composing, touch } from "./dom.js";
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
  if (!inside || document.activeElement === box) return;
  if (touch()) byId(busy ? "stop" : "send").focus();
  else box.focus();
}

/** On a touch screen the focus would bring up the keyboard. */
export function focusQuestion() {
  if (!touch()) box.focus();
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
    if (composing(event)) return;
    const plain = !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.altKey;
    // A keyboard on the screen has no Shift+Enter; there the button sends.
    const sends = event.ctrlKey || event.metaKey || !touch();
    if (event.key === "Enter" && !event.shiftKey && !event.altKey && sends) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && plain && !box.value && editLast()) {
      event.preventDefault();
    }
  });
  addEventListener("resize", () => fit(box));
  byId("skip").addEventListener("click", () => box.focus());
}

/** The letter on the key; where the script is another one, by the key's place. */
function letterOf(event) {
  return /^[a-z]$/i.test(event.key) ? event.key.toUpperCase() : event.code.slice(3);
}

/** `actions` by name; keys do nothing of this while a dialog is open. */
export function setUpKeys({ stop, fresh, compare, settings, list, help }) {
  const letters = { N: fresh, C: compare, S: settings, L: list };
  // On a Mac, Option and a letter write a sign: @ is Option+L on German keyboards.
  const mac = /^(Mac|iP)/.test(navigator.platform);
  const named = mac ? "Control+Shift" : "Alt";
  for (const key of document.querySelectorAll("kbd.alt")) key.textContent = named;
  for (const one of document.querySelectorAll("[title*='(Alt+']")) {
    one.title = one.title.replace("(Alt+", `(${named}+`);
  }
  const chord = ({ altKey, ctrlKey, metaKey, shiftKey }) =>
    mac ? ctrlKey && shiftKey && !altKey && !metaKey : altKey && !ctrlKey && !metaKey && !shiftKey;
  document.addEventListener("keydown", (event) => {
    if (composing(event) || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest?.("input, textarea, select");
    const command = event.ctrlKey || event.metaKey;
    let act = null;
    if (event.key === "Escape") act = stop;
    else if (chord(event)) act = letters[letterOf(event)];
    else if (command && event.key === "/") act = help;
    else if (!typing && !command && event.key === "?") act = help;
    else if (!typing && !command && event.key === "/") act = () => box.focus();
    if (!act) return;
    event.preventDefault();
    act();
  });
}
