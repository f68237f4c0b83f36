// A file of a question, as it is shown before the question is sent and in it.

import { partsOf, sizeOf } from "./attached.js";
import { h, icon, iconButton } from "./dom.js";

const SHOWN = 20_000; // characters of a file that are shown in a question

/** A file's name and size, with a button that takes it away. */
export function fileChip({ name, text }, remove) {
  const size = h("span", { class: "muted" }, sizeOf(new Blob([text]).size));
  const away = iconButton("close", `Remove ${name}`, remove);
  return h("span", { class: "chip" }, icon("file"), h("bdi", { title: name }, name), size, away);
}

/** A question's content: what was typed, and each file folded up. */
export function questionParts(content) {
  const { text, files } = partsOf(content);
  return [
    ...(text || !files.length ? [text] : []),
    ...files.map(({ name, text: inner }) => {
      const size = h("span", { class: "muted" }, sizeOf(new Blob([inner]).size));
      const head = h("summary", {}, icon("file"), h("bdi", {}, name), size);
      const folded = h("details", { class: "file" }, head);
      // Most are never looked at: what is in one is drawn when it is opened.
      folded.addEventListener("toggle", () => {
        if (!folded.open || folded.children.length > 1) return;
        const more = inner.length - SHOWN;
        const rest = more > 0 ? `… and ${more.toLocaleString("en")} characters more` : "";
        const shown = h("pre", { tabindex: 0 }, inner.slice(0, SHOWN));
        folded.append(shown, ...(rest ? [h("p", { class: "muted" }, rest)] : []));
      });
      return folded;
    }),
  ];
}
