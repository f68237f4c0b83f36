// A file of a question, as it is shown before the question is sent and in it.

import { partsOf, sizeOf } from "./attached.js";
import { h, icon, iconButton } from "./dom.js";
import { places } from "./search.js";

const SHOWN = 20_000; // characters of a file that are shown in a question
const AROUND = 2000; // and after a place in it that was looked for

const texts = new WeakMap(); // of the files, by their elements

/** A file's name and size, with a button that takes it away. */
export function fileChip({ name, text }, remove) {
  const size = h("span", { class: "muted" }, sizeOf(new Blob([text]).size));
  const away = iconButton("close", `Remove ${name}`, remove);
  return h("span", { class: "chip" }, icon("file"), h("bdi", { title: name }, name), size, away);
}

/** A question's content: what was typed, and each file folded up. */
export function questionParts(content) {
  const { text, files } = partsOf(content);
  return [...(text || !files.length ? [text] : []), ...files.map(foldedFile)];
}

function foldedFile({ name, text }) {
  const size = h("span", { class: "muted" }, sizeOf(new Blob([text]).size));
  const head = h("summary", {}, icon("file"), h("bdi", {}, name), size);
  const folded = h("details", { class: "file" }, head);
  texts.set(folded, text);
  // Most are never looked at: what is in one is drawn when it is opened.
  folded.addEventListener("toggle", () => {
    if (folded.open && folded.children.length === 1) draw(folded, SHOWN);
  });
  return folded;
}

function draw(folded, length) {
  const text = texts.get(folded);
  const more = text.length - length;
  const rest = more > 0 ? `… and ${more.toLocaleString("en")} characters more` : "";
  while (folded.children.length > 1) folded.lastElementChild.remove();
  folded.append(h("pre", { tabindex: 0 }, text.slice(0, length)));
  if (rest) folded.append(h("p", { class: "muted" }, rest));
}

/** Unfold the files within an element that have these words, as far as they have them. */
export function unfold(within, words) {
  for (const folded of within.querySelectorAll("details.file")) {
    const found = places(texts.get(folded), words);
    if (!found?.length) continue;
    folded.open = true;
    draw(folded, Math.max(SHOWN, ...found.map(([, end]) => end + AROUND)));
  }
}
