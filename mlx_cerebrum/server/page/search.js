// Search over all conversations: their titles and what was said in them.

import { byId, composing, h, plural } from "./dom.js";

const MOST = 60; // hits shown
const EACH = 5; // of one conversation
const RECENT = 12; // conversations shown while nothing is typed
const AROUND = 60; // characters of a message before and after a hit
const SOON = 60; // milliseconds after a key
const SLICE = 12; // milliseconds of searching between two looks at the keyboard
const MARKS = /\p{M}/gu;

/** Small letters without accents: "größe" is found by "grosse" and by "GRÖSSE". */
export function folded(text) {
  const small = text.toLowerCase();
  if (/^[\0-\x7f]*$/.test(small)) return small;
  return small.replaceAll("ß", "ss").normalize("NFKD").replace(MARKS, "");
}

/** Where in `text` the characters stand that come at `places`, in order, in `folded(text)`. */
function unfolded(text, places) {
  const found = [];
  let [place, passed] = [0, 0];
  for (const character of text) {
    passed += folded(character).length;
    while (passed > places[found.length]) found.push(place);
    if (found.length === places.length) break;
    place += character.length;
  }
  return places.map((_, index) => found[index] ?? place);
}

/** [start, end] of the first `most` places of a word in a text; `small` is that text, folded. */
export function placesOf(word, text, most, small = folded(text)) {
  let found = [];
  for (let at = small.indexOf(word); at >= 0 && found.length < 2 * most; ) {
    found.push(at, at + word.length);
    at = small.indexOf(word, at + word.length);
  }
  const same = small.length === text.length && small === text.toLowerCase();
  if (found.length && !same) found = unfolded(text, found);
  return found.flatMap((at, index) => (index % 2 ? [] : [[at, found[index + 1]]]));
}

/** [start, end] of each of `words` in a text, the first of each only; null where one is missing. */
export function places(text, words) {
  const small = folded(text);
  if (!words.every((word) => small.includes(word))) return null;
  return words.flatMap((word) => placesOf(word, text, 1, small));
}

export function wordsOf(query) {
  return [...new Set(folded(query).split(/\s+/).filter(Boolean))];
}

/** A piece of a text with its hits marked. */
function excerpt(text, found, whole = false) {
  const first = Math.min(...found.map(([start]) => start));
  const from = whole ? 0 : Math.max(0, first - AROUND);
  const to = whole ? text.length : Math.min(text.length, first + 2 * AROUND);
  const parts = [from > 0 ? "…" : ""];
  let at = from;
  for (const [start, end] of [...found].sort((a, b) => a[0] - b[0])) {
    if (start < at || end > to) continue;
    parts.push(text.slice(at, start), h("mark", {}, text.slice(start, end)));
    at = end;
  }
  parts.push(text.slice(at, to), to < text.length ? "…" : "");
  return parts;
}

/**
 * Wire the dialog up; returns what opens it. `everything()`: the metas and all messages; `go(meta,
 * node, words)` shows a conversation, and a message of it with its hits where `node` is one.
 */
export function setUpSearch({ everything, go }) {
  const dialog = byId("search");
  const box = byId("search-box");
  const list = byId("search-hits");
  const said = byId("search-said");
  let held = null; // what is searched while the dialog is open
  let hits = [];
  let chosen = -1;
  let timer = null;
  let turn = 0; // of the search that counts

  const choose = (index, scroll = true) => {
    chosen = hits.length ? Math.max(0, Math.min(index, hits.length - 1)) : -1;
    [...list.children].forEach((item, at) => item.setAttribute("aria-selected", at === chosen));
    const item = list.children[chosen];
    if (item) box.setAttribute("aria-activedescendant", item.id);
    else box.removeAttribute("aria-activedescendant");
    if (scroll) item?.scrollIntoView({ block: "nearest" });
  };

  const open = (index) => {
    const hit = hits[index];
    if (!hit) return;
    const words = wordsOf(box.value);
    dialog.close("hit");
    go(hit.meta, hit.node, words);
  };

  const draw = (words, more) => {
    list.replaceChildren(
      ...hits.map(({ meta, node }, index) => {
        const title = meta.title || "Untitled";
        const inTitle = words.length && !node ? places(title, words) : null;
        const name = h("span", { class: "hit-title", dir: "auto" });
        name.append(...(inTitle ? excerpt(title, inTitle, true) : [title]));
        const item = h("li", { id: `hit-${index}`, role: "option", "aria-selected": false }, name);
        if (node) {
          const by = node.role === "user" ? "Question: " : "Answer: ";
          const text = h("span", { class: "hit-text", dir: "auto" }, h("b", {}, by));
          text.append(...excerpt(node.content, places(node.content, words)));
          item.append(text);
        }
        const day = new Date(node?.at ?? meta.updated).toLocaleDateString();
        item.append(h("span", { class: "hit-day" }, day));
        item.addEventListener("click", () => open(index));
        item.addEventListener("pointermove", () => choose(index, false));
        return item;
      }),
    );
    box.setAttribute("aria-expanded", String(hits.length > 0));
    choose(0);
    list.scrollTop = 0;
    if (!words.length) said.textContent = hits.length ? "" : "There are no conversations yet.";
    else if (!hits.length) said.textContent = "Nothing found.";
    else said.textContent = plural(hits.length, "hit") + (more ? ", and there are more." : "");
  };

  const look = async () => {
    const own = (turn += 1);
    const words = wordsOf(box.value);
    const found = [];
    let more = false;
    if (!held) return;
    if (!words.length) {
      hits = held.map(({ meta }) => ({ meta, node: null })).slice(0, RECENT);
      draw(words, false);
      return;
    }
    let until = performance.now() + SLICE;
    for (const { meta, nodes } of held) {
      let here = 0;
      if (places(meta.title, words)) found.push({ meta, node: null });
      for (const node of nodes) {
        if (performance.now() > until) {
          await new Promise((resolve) => setTimeout(resolve));
          if (own !== turn || !held) return; // another letter came, or Escape
          until = performance.now() + SLICE;
        }
        if (!places(node.content, words)) continue;
        if (here === EACH) {
          more = true;
          break;
        }
        found.push({ meta, node });
        here += 1;
      }
      if (found.length > MOST) {
        more = true;
        break;
      }
    }
    hits = found.slice(0, MOST);
    draw(words, more);
  };

  box.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(look, SOON);
  });
  box.addEventListener("keydown", async (event) => {
    if (composing(event)) return;
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    const round = { [hits.length]: 0, "-1": Infinity }; // past the end to the beginning
    if (by) choose(Math.abs(by) === 1 ? (round[chosen + by] ?? chosen + by) : chosen + by);
    else if (event.key === "Enter") {
      clearTimeout(timer);
      if (timer) await look();
      open(chosen);
    } else return;
    timer = null;
    event.preventDefault();
  });
  dialog.addEventListener("close", () => {
    clearTimeout(timer);
    [held, hits] = [null, []];
    list.replaceChildren();
  });

  return async () => {
    if (dialog.open) return;
    box.value = "";
    said.textContent = "";
    dialog.showModal();
    box.focus();
    const { metas, nodes } = await everything();
    const of = new Map(metas.map((meta) => [meta.id, []]));
    for (const node of nodes) of.get(node.conversation)?.push(node);
    held = metas.map((meta) => {
      const own = of.get(meta.id).sort((a, b) => b.at - a.at); // what was said last comes first
      return { meta, nodes: own };
    });
    await look();
  };
}
