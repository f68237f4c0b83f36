// The frame around the conversation: the list that slides in, the theme, dialogs, the banner.

import { byId } from "./dom.js";

const THEME = "cerebrum.theme";
const LIST = "cerebrum.list";
const NARROW = matchMedia("(max-width: 760px)");

function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // it holds until the page is closed
  }
}

function kept(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function setUpList() {
  const root = document.documentElement;
  const button = byId("toggle-list");
  const sidebar = byId("sidebar");
  const show = (open) => {
    root.classList.toggle("list-open", open);
    button.setAttribute("aria-expanded", String(open));
    sidebar.inert = !open;
  };
  const begin = () => show(!NARROW.matches && kept(LIST) !== "closed");
  const toggle = () => {
    const open = !root.classList.contains("list-open");
    show(open);
    if (!NARROW.matches) keep(LIST, open ? null : "closed");
    else if (open) byId("new").focus();
  };
  /** True where it was open. */
  const closeDrawer = () => {
    if (!NARROW.matches || !root.classList.contains("list-open")) return false;
    show(false);
    button.focus();
    return true;
  };
  button.addEventListener("click", toggle);
  byId("shade").addEventListener("click", closeDrawer);
  NARROW.addEventListener("change", begin);
  begin();
  return { toggleList: toggle, closeDrawer };
}

function setUpTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("theme");
  const now = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  const label = () => {
    const other = now() === "dark" ? "Light colours" : "Dark colours";
    button.setAttribute("aria-label", other);
    button.title = other;
  };
  button.addEventListener("click", () => {
    const next = now() === "dark" ? "light" : "dark";
    const asSystem = next === (dark.matches ? "dark" : "light");
    if (asSystem) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    keep(THEME, asSystem ? null : next); // the system's own is followed when it changes
    label();
  });
  dark.addEventListener("change", label);
  label();
}

/** Ask for the server's key: the promise of it, or of null where the reader gives none. */
function askKey(refused) {
  const dialog = byId("key");
  const input = byId("key-value");
  byId("key-note").textContent = refused
    ? "The server refused that key. Is it the one it was started with?"
    : "This server was started with an API key. It is kept until this tab is closed.";
  input.value = "";
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const closed = () => resolve(dialog.returnValue === "given" ? input.value.trim() : null);
    dialog.addEventListener("close", closed, { once: true });
  });
}

let bannerTimer = null;

/** A line above the conversation, or none; for a while only where `milliseconds` are given. */
function banner(text, milliseconds = null) {
  clearTimeout(bannerTimer);
  byId("banner").hidden = text === null;
  byId("banner").textContent = text ?? "";
  if (text !== null && milliseconds) bannerTimer = setTimeout(() => banner(null), milliseconds);
}

/** In Safari the keyboard on the screen covers the page's end instead of shortening the page. */
function setUpKeyboard() {
  const view = window.visualViewport;
  view?.addEventListener("resize", () => {
    const covered = view.scale === 1 && view.height < innerHeight - 1;
    document.body.style.height = covered ? `${view.height}px` : "";
    if (covered) scrollTo(0, 0);
  });
}

export function setUpShell() {
  setUpTheme();
  setUpKeyboard();
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
      // A click on the dialog itself is one beside its contents.
      if (event.target === dialog && dialog.id !== "settings") dialog.close();
    });
  }
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (/^[!-~]+$/.test(byId("key-value").value.trim())) byId("key").close("given");
    else byId("key-note").textContent = "A key is letters, digits and signs without spaces.";
  });
  const help = () => byId("shortcuts").showModal();
  byId("help").addEventListener("click", help);
  return { ...setUpList(), askKey, banner, help };
}
