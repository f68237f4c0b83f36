// Formulas and code as the server sets them. Until it has, and where it can't, they are shown as
// they were written.

import { typeset } from "./api.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
// What may be drawn; the server's list (typeset/tex.py) is the same.
const ELEMENTS = new Set(
  ("math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt msub msubsup " +
    "msup mtable mtd mtext mtr munder munderover").split(" "),
);
const ATTRIBUTES = new Set(
  ("accent accentunder display displaystyle form height linethickness lspace mathvariant " +
    "maxsize minsize movablelimits notation rspace scriptlevel stretchy voffset width").split(" "),
);
const STYLES = new Set(
  ("border-bottom border-left border-right border-top color font-style font-weight " +
    "justify-items margin-left padding-bottom padding-left padding-right padding-top " +
    "text-align width").split(" "),
);
const KINDS = ["comment", "keyword", "name", "number", "string"];

const KEPT = 2000; // answers, by their job
const AT_ONCE = 50; // jobs of a request
const SOON = 30; // milliseconds: what comes together is asked for together
const LATER = 5000; // after the server did not answer
const TRIES = 5;
const LONG = 30; // characters of a formula that may need more room than a line has

const LEAST_CODE = 200; // characters of a program that grows, before it has colours
const MOST_CODE = 40_000; // more than that the server does not colour

const coloured = new WeakMap(); // how many characters of an element's code are
const askedFor = new WeakMap(); // and of how many the colours were asked for last
const known = new Map();
const waiting = new Map(); // what to draw when the answer is there, by job
let timer = null;
let failed = 0;

/** Show a formula with its marks, `$x^2$`, in an element. */
export function setFormula(element, source) {
  element.textContent = source;
  want(["tex", source], (tree) => {
    const math = build(tree); // raises before anything is changed
    element.dataset.tex = source;
    element.classList.add("set");
    const block = math.getAttribute("display") === "block";
    element.classList.toggle("block", block);
    element.classList.toggle("long", !block && math.textContent.length > LONG);
    element.replaceChildren(math);
  });
}

/** Colour the parts of a program that stands in an element, or of its beginning. */
export function setCode(element, language, text) {
  if (!language || !text || text.length > MOST_CODE) return;
  want(["code", language, text], (parts) => {
    const whole = element.textContent; // it may have grown meanwhile
    if (!whole.startsWith(text) || (coloured.get(element) ?? 0) > text.length) return;
    coloured.set(element, text.length);
    element.replaceChildren(
      ...parts.map(([kind, piece]) => {
        if (!KINDS.includes(kind)) return document.createTextNode(piece);
        const span = document.createElement("span");
        span.className = kind;
        span.textContent = piece;
        return span;
      }),
      whole.slice(text.length),
    );
  });
}

/**
 * Colour the lines there are of a program that still grows: asked for anew only where it is half as
 * long again, so all that is sent of it is no more than three times its length.
 */
export function setGrowingCode(element, language, text) {
  const whole = text.lastIndexOf("\n");
  if (whole < LEAST_CODE || whole < 1.5 * (askedFor.get(element) ?? 0)) return;
  askedFor.set(element, whole);
  setCode(element, language, text.slice(0, whole));
}

function want(job, draw) {
  const key = JSON.stringify(job);
  if (known.has(key)) {
    drawn(known.get(key), draw);
    return;
  }
  if (!waiting.has(key)) waiting.set(key, []);
  waiting.get(key).push(draw);
  timer ??= setTimeout(ask, SOON);
}

function drawn(answer, draw) {
  if (answer === null) return;
  try {
    draw(answer);
  } catch {
    // not what a server of ours says: it stays as it was written
  }
}

async function ask() {
  const keys = [...waiting.keys()].slice(0, AT_ONCE);
  let answers = [];
  try {
    answers = await typeset(keys.map((key) => JSON.parse(key)));
    failed = 0;
  } catch {
    failed += 1; // shown as written meanwhile
    if (failed >= TRIES) waiting.clear();
  }
  answers.forEach((answer, index) => {
    const draws = waiting.get(keys[index]) ?? [];
    waiting.delete(keys[index]);
    known.set(keys[index], answer);
    if (known.size > KEPT) known.delete(known.keys().next().value);
    for (const draw of draws) drawn(answer, draw);
  });
  timer = waiting.size ? setTimeout(ask, failed ? LATER : SOON) : null;
}

/** A tree [name, attributes, children] as elements; raises for what is not allowed. */
function build(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const [name, attributes, children] = node;
  if (!ELEMENTS.has(name)) throw new Error(`no element for a formula: ${name}`);
  const element = document.createElementNS(MATHML, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") {
      for (const one of value.split(";")) {
        const [property, set] = one.split(":");
        if (STYLES.has(property)) element.style.setProperty(property, set);
      }
    } else if (ATTRIBUTES.has(key)) {
      element.setAttribute(key, value);
    }
  }
  element.append(...children.map(build));
  return element;
}

const setAround = (node) => (node.nodeType === 1 ? node : node.parentElement)?.closest(".set");

/** Copied text has a formula's source: what a selection's text would be of its signs is no use. */
export function setUpCopy(within) {
  addEventListener("copy", (event) => {
    const selection = getSelection();
    if (!selection.rangeCount || selection.isCollapsed) return;
    const range = selection.getRangeAt(0);
    const cut = [...within.querySelectorAll(".set")].filter((one) => range.intersectsNode(one));
    if (!cut.length) return;
    const [first, last] = [setAround(range.startContainer), setAround(range.endContainer)];
    if (first) range.setStartBefore(first);
    if (last) range.setEndAfter(last);
    const drawn = cut.map((one) => [...one.childNodes]);
    within.classList.add("copying");
    for (const one of cut) one.replaceChildren(one.dataset.tex);
    const text = selection.toString();
    cut.forEach((one, index) => one.replaceChildren(...drawn[index]));
    within.classList.remove("copying");
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
  });
}
