// What is known of the models that run here: the plan, drawn, and figures in words.

import { sizeOf } from "./attached.js";
import { byId, h, plural } from "./dom.js";
import { forgetVotes, onVotes, rivals, tallyText } from "./votes.js";

const SPACE = "http://www.w3.org/2000/svg";
const WORDS = 0.75; // of a token, about, in English
const READING = 4; // words a second that people read
const HIGH = 160; // of the drawing

/** Runs of blocks in a layer map: [first, last], as they follow each other. */
export function runs(map) {
  const found = [];
  for (const block of map) {
    const last = found.at(-1);
    if (last && block === last[1] + 1) last[1] = block;
    else found.push([block, block]);
  }
  return found;
}

function drawing(map, blocks) {
  const svg = document.createElementNS(SPACE, "svg");
  svg.setAttribute("viewBox", `0 0 ${map.length} ${blocks}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("height", String(Math.min(HIGH, 5 * blocks)));
  svg.setAttribute("class", "plan");
  svg.setAttribute("role", "img");
  const label = `Which of ${blocks} blocks runs at each of ${map.length} positions`;
  svg.setAttribute("aria-label", label);
  const path = document.createElementNS(SPACE, "path");
  const squares = map.map((block, position) => `M${position} ${blocks - 1 - block}h1v1h-1z`);
  path.setAttribute("d", squares.join(""));
  svg.append(path);
  return svg;
}

const list = (map) => {
  const found = runs(map);
  const shown = found.slice(0, 12).map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`));
  return shown.join(", ") + (found.length > 12 ? ", …" : "");
};

/** A pace in words. */
export function paceText(speed) {
  const words = speed * WORDS;
  const shown = words < 10 ? words.toFixed(1) : Math.round(words);
  const slow = words < READING / 1.2 ? "slower than" : "about as fast as";
  const than = words > 1.2 * READING ? "faster than" : slow;
  return `about ${shown} words a second, ${than} people read`;
}

/** The lines about one model: pairs of a name and what is said. */
function facts(model, used, speed) {
  const { blocks, positions, bits, bytes, sliding_window: window, context_length: length } = model;
  const again = positions === blocks ? "each once" : `in ${plural(positions, "position")}`;
  const round = (count) => (count < 200 ? Math.round(count) : Math.round(count / 100) * 100);
  const about = (tokens) => `about ${plural(round(tokens * WORDS), "word")}`;
  const weights = [bits && `stored in ${bits} bits each`, bytes && sizeOf(bytes)];
  weights.push(positions > blocks && "once for all the positions that run them");
  const passed = window && used > window;
  const looked = `${plural(window ?? 0, "token")}, ${about(window)}, are looked at directly.`;
  const sight = passed
    ? "This conversation is longer: what is older the model knows only through what it made of it."
    : "This conversation is still within it.";
  return [
    ["Blocks", `${blocks} stored, run ${again}`],
    model.layer_map && ["Order", list(model.layer_map)],
    (bits || bytes) && ["Weights", weights.filter(Boolean).join(", ")],
    length && ["Context", `${plural(length, "token")} of conversation at most, ${about(length)}`],
    ["Window", window ? `${looked} ${sight}` : "All of the context is looked at directly."],
    speed && ["Pace", `${speed.toFixed(1)} tokens a second in the last answer: ${paceText(speed)}`],
  ].filter(Boolean);
}

/**
 * Wire the dialog up; returns what opens it. `now()`: { models, used, speeds }: those shown, the
 * tokens of the conversation, the pace of each model's last answer; `shelf` has the others.
 */
export function setUpCard({ now, forgotten, shelf }) {
  const dialog = byId("card");
  const draw = () => {
    const { models, used, speeds } = now();
    const { machine } = shelf;
    const parts = models.map((model) => {
      const row = shelf.rows.find((one) => one.model === model.id) ?? {};
      const known = { ...model, bits: model.bits ?? row.bits, bytes: row.bytes };
      const lines = facts(known, used, speeds.get(model.id));
      for (const other of rivals(model.id)) lines.push(["Your votes", tallyText(model.id, other)]);
      if (machine) lines.push(["Machine", machine]);
      const map = model.layer_map;
      return h(
        "section",
        {},
        h("h3", {}, model.id),
        map?.length ? h("figure", {}, drawing(map, model.blocks), caption(model)) : null,
        h("dl", {}, ...lines.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
      );
    });
    byId("card-models").replaceChildren(...parts);
    drawShelf(shelf);
    byId("card-forget").hidden = !models.some(({ id }) => rivals(id).length);
  };
  byId("card-forget").addEventListener("click", () => forgotten(forgetVotes()));
  onVotes(() => dialog.open && draw());
  shelf.changed.push(() => dialog.open && draw());
  return () => {
    draw();
    dialog.showModal();
    shelf.look();
  };
}

/** What could run too: each with a button, how far it is, or why it can't be loaded now. */
function drawShelf(shelf) {
  const others = shelf.rows.filter(({ state }) => state === "on the shelf" || state === "loading");
  byId("card-shelf").hidden = !others.length;
  const focused = document.activeElement?.closest("#card-others li")?.dataset.id;
  const items = others.map((row) => {
    const { id, bits, bytes, positions, why_not: why } = row;
    const known = [bits && `${bits} bits`, bytes && sizeOf(bytes)];
    known.push(positions && plural(positions, "position"));
    const about = h("span", { class: "muted" }, known.filter(Boolean).join(", "));
    const item = h("li", { "data-id": id }, h("b", {}, id), about);
    if (row.state === "loading") {
      const { done = 0, total = 0 } = row.loading ?? {};
      const words = total ? `${sizeOf(done)} of ${sizeOf(total)}` : "Loading";
      const bar = { max: total || 1, value: total ? done : null, "aria-label": `Loading ${id}` };
      item.append(h("progress", bar), h("span", { class: "muted" }, words));
    } else if (why) item.append(h("span", { class: "why" }, why));
    else {
      const act = { type: "button", class: "again", "aria-label": `Load ${id}` };
      item.append(h("button", { ...act, onclick: () => shelf.load(id) }, "Load"));
    }
    return item;
  });
  byId("card-others").replaceChildren(...items);
  if (focused === undefined) return;
  const again = [...byId("card-others").children].find((item) => item.dataset.id === focused);
  (again?.querySelector("button") ?? byId("card-title")).focus();
}

function caption({ positions, blocks }) {
  const way = `${plural(positions, "position")} from left to right`;
  return h("figcaption", { class: "muted" }, `${way}, ${plural(blocks, "block")} from below`);
}
