// How answers are sampled, and the dialog that says so. Kept for every conversation.

import { byId, touch } from "./dom.js";

const KEY = "cerebrum.settings";

// Each field's range as the form states it; an empty one leaves the choice to the server.
const FIELDS = {
  temperature: { min: 0, max: 2 },
  top_p: { min: 0, max: 1, above: true },
  min_p: { min: 0, max: 1, below: true },
  seed: { min: 0, max: 2 ** 32 - 1, whole: true },
  max_tokens: { min: 1, max: 1_000_000, whole: true },
};
const START = {}; // the server's own: greedy, unless it was started with other ones
// How another answer to the same question is drawn where the first was the likeliest.
const ANOTHER = { temperature: 0.7, min_p: 0.05 };

let kept = load();

function load() {
  let found = null;
  try {
    found = JSON.parse(localStorage.getItem(KEY));
  } catch {
    // unreadable or switched off: as at the beginning
  }
  const values = typeof found === "object" && found !== null ? found : START;
  const good = {};
  for (const name of Object.keys(FIELDS)) {
    if (problem(name, values[name]) === null) good[name] = values[name];
  }
  good.system = typeof values.system === "string" ? values.system : "";
  return good;
}

function problem(name, value) {
  const { min, max, above, below, whole } = FIELDS[name];
  const range = `from ${min} to ${max.toLocaleString("en")}`;
  if (!Number.isFinite(value)) return `A number ${range}, or nothing.`;
  if (whole && !Number.isInteger(value)) return `A whole number ${range}, or nothing.`;
  if (above && (value <= min || value > max)) return `Above ${min}, to ${max}, or nothing.`;
  if (below && (value < min || value >= max)) return `From ${min} to below ${max}, or nothing.`;
  if (value < min || value > max) return `A number ${range}, or nothing.`;
  return null;
}

/**
 * What a request says about sampling; `another` asks for another answer than the likeliest. There
 * is always a seed, so that an answer can be had again: the kept one, `seed`, or one by chance.
 */
export function sampling({ another = false, seed } = {}) {
  const { system, ...values } = kept;
  const { temperature } = ANOTHER;
  const greedy = !values.temperature;
  const changed = another && greedy ? { ...ANOTHER, ...values, temperature } : values;
  const chance = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return { ...changed, seed: values.seed ?? seed ?? chance() };
}

/** The system text a new conversation begins with. */
export function systemForNew() {
  return kept.system;
}

function keep(values) {
  kept = values;
  try {
    localStorage.setItem(KEY, JSON.stringify(values));
  } catch {
    // they hold until the page is closed
  }
}

/** What a setting is where the reader leaves it empty, in words. */
function defaultText(name, value) {
  if (name === "seed") return "Default: another one each time.";
  if (value === undefined || value === null) return "Default: the server's own.";
  return `Default: ${value.toLocaleString("en")}${name === "max_tokens" ? " tokens" : ""}.`;
}

/**
 * Wire the dialog up. `opened()` gives { system, placeholder } of the conversation shown, the
 * server's `defaults` and the context's `length` in tokens; `saved(system)` gets its system text.
 */
export function setUpSettings({ opened, saved }) {
  const dialog = byId("settings");
  const form = byId("settings-form");
  const system = form.elements.system;
  const everywhere = form.elements.everywhere;

  let defaults = {};

  const check = (name) => {
    const input = form.elements[name];
    const empty = input.value.trim() === "" && !input.validity.badInput;
    const wrong = empty ? null : problem(name, input.valueAsNumber);
    byId(`${name}-problem`).textContent = wrong ?? "";
    input.setAttribute("aria-invalid", String(wrong !== null));
    const slider = byId(`${name}-slider`);
    if (slider) {
      slider.value = empty || wrong ? (defaults[name] ?? slider.min) : input.value;
      slider.classList.toggle("unset", empty);
      const value = empty ? defaultText(name, defaults[name]) : input.value;
      slider.setAttribute("aria-valuetext", value);
    }
    return [wrong, empty ? undefined : input.valueAsNumber];
  };

  const show = (values) => {
    for (const name of Object.keys(FIELDS)) {
      form.elements[name].value = values[name] ?? "";
      check(name);
    }
  };

  for (const name of Object.keys(FIELDS)) {
    form.elements[name].addEventListener("input", () => check(name));
    const slider = byId(`${name}-slider`);
    slider?.addEventListener("input", () => {
      form.elements[name].value = slider.value;
      check(name);
    });
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const values = {};
    for (const name of Object.keys(FIELDS)) {
      const [wrong, value] = check(name);
      if (wrong !== null) {
        form.elements[name].focus();
        return;
      }
      if (value !== undefined) values[name] = value;
    }
    keep({ ...values, system: everywhere.checked ? system.value : kept.system });
    saved(system.value);
    dialog.close();
  });
  byId("settings-reset").addEventListener("click", () => show(START));
  addEventListener("storage", (event) => {
    if (event.key === KEY) kept = load(); // set in another tab
  });

  return () => {
    const now = opened();
    defaults = now.defaults ?? {};
    if (now.length) byId("max_tokens-slider").max = now.length;
    for (const name of Object.keys(FIELDS)) {
      byId(`${name}-default`).textContent = defaultText(name, defaults[name]);
      form.elements[name].placeholder = defaults[name] ?? "";
    }
    show(kept);
    system.value = now.system;
    system.placeholder = now.placeholder;
    everywhere.checked = false;
    dialog.showModal();
    if (touch()) byId("settings-title").focus(); // not its first field: the keyboard would come up
  };
}
