// Where questions are typed, and the keys that work everywhere.

import { Attached, LONGEST, guess, partsOf, withFiles } from "./attached.js";
import { fileChip } from "./chips.js";
import { announce, byId, composing, plural, touch } from "./dom.js";
import { toast } from "./list.js";
import { fit } from "./messages.js";

const DRAFT = "cerebrum.draft.";

const SOON = 300; // milliseconds after a key

const box = byId("question");
const drafts = new Map(); // what the browser did not keep: more than it has room for
let place = ""; // whose draft this is
let drafted = () => {}; // told of the tokens of the question, about, whenever it changes
let timer = null; // until the draft is kept

const attached = new Attached({
  changed: () => {
    drawChips();
    keep();
  },
  wrong: toast,
  room: () => box.value.length,
});

function drawChips() {
  const chips = attached.files.map((file) => {
    return fileChip(file, () => {
      attached.remove(file);
      box.focus();
    });
  });
  byId("attached").replaceChildren(...chips);
  byId("attached").hidden = !chips.length;
}

/** The question as it would be sent now. */
function question() {
  return withFiles(box.value, attached.files);
}

function keep() {
  drafted(guess(box.value) + attached.tokens);
  clearTimeout(timer);
  if (attached.files.length) timer = setTimeout(store, SOON); // large ones take their time
  else store();
}

function store() {
  clearTimeout(timer);
  timer = null;
  const draft = question();
  drafts.delete(place);
  try {
    if (draft) sessionStorage.setItem(DRAFT + place, draft);
    else sessionStorage.removeItem(DRAFT + place);
  } catch {
    drafts.set(place, draft);
  }
}

export function setQuestion(text) {
  const { text: typed, files } = partsOf(text);
  box.value = typed;
  attached.set(files);
  fit(box);
}

/** Go to another conversation's draft. */
export function useDraft(id) {
  if (timer) store();
  place = id;
  let draft = drafts.get(id) ?? "";
  try {
    draft ||= sessionStorage.getItem(DRAFT + id) ?? "";
  } catch {
    // none, then
  }
  setQuestion(draft);
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

/** Is a line a file's name, path or address? */
function namesFile(line, name) {
  const last = line.slice(line.lastIndexOf("/") + 1);
  return last === name || last === encodeURIComponent(name);
}

/** Files that are dropped on the conversation, pasted or chosen go into the question. */
function setUpFiles() {
  const take = async (files) => {
    const before = attached.files.length;
    await attached.add([...files]);
    const added = attached.files.length - before;
    if (added > 0) announce(`${plural(added, "file")} added to the question.`);
    focusQuestion();
  };
  byId("attach").addEventListener("click", () => byId("text-files").click());
  byId("text-files").addEventListener("change", async ({ target }) => {
    const files = [...target.files];
    target.value = "";
    await take(files);
  });
  box.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    const text = event.clipboardData.getData("text/plain").trim();
    // A file comes with its name or address as text. A table of an office program comes with its
    // picture as a file: there the text is what is meant.
    const lines = text ? text.split(/\s*\n/) : [];
    const named = lines.every((line) => files.some(({ name }) => namesFile(line, name)));
    if (!files.length || !named) return;
    event.preventDefault();
    take(files);
  });
  const main = document.querySelector("main");
  const holds = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
  // Anywhere on the page: a file that is missed must not take the page's place.
  addEventListener("dragover", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    const free = !document.querySelector("dialog[open]");
    const [here, list] = [main, byId("sidebar")].map((one) => free && one.contains(event.target));
    event.dataTransfer.dropEffect = here || list ? "copy" : "none"; // the list imports it
    main.classList.toggle("dropping", here);
  });
  const over = () => main.classList.remove("dropping");
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) over();
  });
  addEventListener("drop", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    if (main.classList.contains("dropping")) take(event.dataTransfer.files);
    over();
  });
}

/**
 * `actions`: send(text) (true where it was taken), stop, editLast; `drafted(tokens)` is told
 * about how many the question has by now.
 */
export function setUpComposer({ send, stop, editLast, drafted: tell }) {
  drafted = tell;
  const submit = () => {
    const asked = question();
    if (!asked.trim()) return;
    if (asked.length > LONGEST) {
      const most = LONGEST.toLocaleString("en");
      toast(`The question is too long: it holds ${most} characters at most.`);
    } else if (send(asked)) {
      setQuestion("");
    }
  };
  setUpFiles();
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("stop").addEventListener("click", stop);
  box.addEventListener("input", () => {
    keep();
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
    } else if (event.key === "ArrowUp" && plain && !question() && editLast()) {
      event.preventDefault();
    }
  });
  addEventListener("pagehide", () => timer && store());
  addEventListener("resize", () => fit(box));
  byId("skip").addEventListener("click", () => box.focus());
}

/** The letter on the key; where the script is another one, by the key's place. */
function letterOf(event) {
  return /^[a-z]$/i.test(event.key) ? event.key.toUpperCase() : event.code.slice(3);
}

/** `actions` by name; keys do nothing of this while a dialog is open. */
export function setUpKeys({ stop, fresh, compare, settings, list, help, search }) {
  const letters = { N: fresh, C: compare, S: settings, L: list };
  // On a Mac, Option and a letter write a sign: @ is Option+L on German keyboards.
  const mac = /^(Mac|iP)/.test(navigator.platform);
  const named = mac ? "Control+Shift" : "Alt";
  for (const key of document.querySelectorAll("kbd.alt")) key.textContent = named;
  if (mac) {
    for (const key of document.querySelectorAll("kbd.command")) key.textContent = "⌘";
    byId("open-search").title = "Search (⌘K)";
  }
  for (const one of document.querySelectorAll("[title*='(Alt+']")) {
    one.title = one.title.replace("(Alt+", `(${named}+`);
  }
  const plain = ({ altKey, shiftKey }) => !altKey && !shiftKey;
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
    else if ((mac ? event.metaKey : event.ctrlKey) && plain(event) && letterOf(event) === "K") {
      act = search;
    }
    else if (!typing && !command && event.key === "?") act = help;
    else if (!typing && !command && event.key === "/") act = () => box.focus();
    if (!act) return;
    event.preventDefault();
    act();
  });
}
