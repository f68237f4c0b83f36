// Building elements. Nothing on this page parses markup: text becomes text nodes, always.

/** An element; `on...` properties are listeners, the rest are attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** One of the drawings at the top of index.html. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that is only a drawing; its name is read out and shown as a tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  const all = { type: "button", class: "quiet", "aria-label": label, title: label, ...properties };
  return h("button", { ...all, onclick }, icon(name));
}

export function byId(id) {
  return document.getElementById(id);
}

/** Make `parent`'s children exactly `wanted`, leaving alone those already in place. */
export function arrange(parent, wanted) {
  wanted.forEach((element, index) => {
    if (parent.children[index] !== element) {
      parent.insertBefore(element, parent.children[index] ?? null);
    }
  });
  while (parent.children.length > wanted.length) parent.lastElementChild.remove();
}

/** A name no other tab makes; crypto.randomUUID exists only under https and on localhost. */
export function newId() {
  const random = crypto.getRandomValues(new Uint32Array(3));
  return Date.now().toString(36) + Array.from(random, (n) => n.toString(36)).join("");
}

export function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

/** Put text on the clipboard; true where that worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain http on another machine has no clipboard interface; this older way still works.
    const box = h("textarea", { class: "hidden-text", readonly: true });
    box.value = text;
    const focused = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    focused?.focus?.();
    return done;
  }
}

/** Say "copied" on a button for a moment. */
export async function copyFrom(button, text) {
  const done = await copyText(text);
  const before = button.dataset.label ?? button.getAttribute("aria-label") ?? button.textContent;
  button.dataset.label = before;
  const said = done ? "Copied" : "Could not copy";
  announce(said);
  const show = (word) => {
    if (button.hasAttribute("aria-label")) {
      button.setAttribute("aria-label", word);
      button.title = word;
    } else {
      button.textContent = word;
    }
  };
  show(said);
  button.classList.toggle("did", done);
  setTimeout(() => {
    show(before);
    button.classList.remove("did");
  }, 1500);
}

/** Have a screen reader say something, politely; nothing is shown. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = "";
  // A region that is emptied and filled at once says nothing.
  setTimeout(() => (region.textContent = text), 50);
}

/** Is this key the input method's? Safari says so only by 229 for the Enter that ends a word. */
export function composing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** A finger is what points: the keyboard is on the screen then, and comes up with the focus. */
export function touch() {
  return matchMedia("(pointer: coarse)").matches;
}
