// The page: puts its parts together.

import { models as askModels, onKeyNeeded } from "./api.js";
import { sizeOf } from "./attached.js";
import { setUpCard } from "./card.js";
import { Chat } from "./chat.js";
import { focusQuestion, setBusy, setQuestion, setUpComposer, setUpKeys, useDraft } from "./composer.js";
import { Conversation, newMeta } from "./conversation.js";
import { announce, byId, h } from "./dom.js";
import { drawList, tellNotKept, toast } from "./list.js";
import { setUpCopy } from "./maths.js";
import { setUpSearch } from "./search.js";
import { setUpSettings, systemForNew } from "./settings.js";
import { Shelf } from "./shelf.js";
import { setUpShell } from "./shell.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";
import { setUpExport, setUpFiles } from "./transfer.js";

const SHELF = "shelf:"; // before the name of a model in the menu that is not loaded
const AGAIN = 2000; // milliseconds between two looks for a server that is gone
const EXAMPLES = [
  "A bat and a ball cost 1.10 together, and the bat costs 1 more than the ball. What does the ball cost?",
  "Explain how a rainbow comes about, step by step, to a curious ten-year-old.",
  "Which weighs more, a litre of ice or a litre of water, and why?",
  "Write a Python function that returns the second largest number of a list.",
];

// What the models begin with where the system text is empty.
const CARD =
  "A chat between a user and a thinking artificial intelligence assistant. The assistant " +
  "describes its thought process and gives helpful and detailed answers to the user's questions.";
const OWN = "Empty: the text that the model's own template begins with.";

let models = [];
let conversation;
let wanted = null; // the conversation asked for last
let loadFor = null; // the model chosen from the shelf, and where: { id, lane, conversation }
let looking = null; // the search for a server that is gone
const open = new Map(); // conversations with an answer on its way, by id
const missed = new Map(); // that other tabs changed while this one was hidden, or opened: listed?

const store = await Store.open({
  onfail: tellNotKept,
  reopened: () => conversation && store.put(conversation.meta, [...conversation.nodes.values()]),
});
const chat = new Chat(store, {
  changed,
  grew: (node) => thread.grew(node),
  ended,
  lost: () => look(),
  models: () => models,
});
const actions = {
  retry: (node) => {
    chat.retry(conversation, node);
    focusQuestion(); // the button is gone, with the answer it belonged to
  },
  cutOff: (node) => chat.cutOff(conversation, node),
  goOn: (node) => {
    chat.goOn(conversation, node);
    focusQuestion();
  },
  edit: (node, text) => {
    const taken = chat.edit(conversation, node, text);
    if (taken) focusQuestion();
    return taken;
  },
  step: (node, by) => thread.focusVersion(chat.step(conversation, node, by), by),
  keep: (lane) => {
    chat.keep(conversation, lane);
    focusQuestion();
  },
  busy: (one) => chat.busy(one),
  waitOf: (node) => chat.waits.get(node.id),
};
const thread = new Thread(actions, (node) => chat.runs.get(node));
const shell = setUpShell();
const shelf = new Shelf({
  arrived: async ({ id, model }) => {
    models = await askModels();
    shell.banner(`${id} is loaded.`, 4000);
    const { lane, conversation: asked } = loadFor?.id === id ? loadFor : {};
    if (asked) loadFor = null;
    if (asked) asked.meta.models = asked.meta.models.with(lane, model ?? id);
    if (asked === conversation) keepMeta();
    else draw();
  },
  failed: (line) => {
    shell.banner(null);
    toast(line);
  },
  news: ({ id, loading }) => {
    const far = loading?.total ? `: ${sizeOf(loading.done)} of ${sizeOf(loading.total)}` : "";
    shell.banner(`Loading ${id}${far}`);
  },
});
shelf.changed.push(() => conversation && draw());

function changed(one) {
  if (chat.busy(one)) open.set(one.meta.id, one);
  else open.delete(one.meta.id);
  if (one === conversation) draw();
  drawAll();
}

/** The conversation on the screen. */
function draw() {
  const { meta } = conversation;
  const chosen = chat.modelsOf(conversation);
  thread.show(conversation, chosen);
  setBusy(chat.busy(conversation));
  const name = meta.title || "New conversation";
  byId("title").textContent = name;
  document.title = meta.title ? `${name} – Cerebrum` : "Cerebrum";
  for (const lane of [0, 1]) {
    const select = byId(`model-${lane}`);
    select.replaceChildren(...models.map(({ id }) => h("option", { value: id }, id)), ...onShelf());
    select.value = chosen[lane]?.id ?? "";
    select.disabled = chat.busy(conversation) || !models.length;
  }
  byId("open-card").disabled = !models.length;
  byId("model-0").setAttribute("aria-label", meta.comparing ? "First model" : "Model");
  byId("model-1").hidden = byId("against").hidden = !meta.comparing;
  byId("compare").setAttribute("aria-pressed", String(meta.comparing));
  byId("compare").disabled = chat.busy(conversation);
  byId("about").textContent = aboutModels(meta.comparing ? chosen : chosen.slice(0, 1));
}

/** What could be loaded, as a part of the menu. */
function onShelf() {
  const rows = shelf.rows.filter(({ state }) => ["on the shelf", "loading"].includes(state));
  const options = rows.map(({ id, bytes, state, why_not: why }) => {
    const size = bytes ? ` (${sizeOf(bytes)})` : "";
    const note = why ? ", not now" : state === "loading" ? ", loading" : "";
    const off = Boolean(why) || state === "loading";
    return h("option", { value: SHELF + id, disabled: off, title: why }, `${id}${size}${note}`);
  });
  return options.length ? [h("optgroup", { label: "Load from the shelf" }, ...options)] : [];
}

function aboutModels(chosen) {
  const told = chosen.filter((model) => model?.positions);
  const one = ({ id, blocks, positions }) => {
    const way = blocks === positions ? "in order" : `in ${positions} positions`;
    return `${id}: ${blocks} stored blocks, run ${way}.`;
  };
  return told.map(one).join(" ");
}

async function drawAll() {
  const metas = await store.list();
  const actions = { open: (meta) => go(meta.id), rename, save: openExport, remove };
  drawList(metas, conversation.meta.id, actions);
}

/** Show a conversation, or a new one. */
async function go(id) {
  wanted = id;
  thread.unmark();
  const loaded = id && !open.has(id) ? await store.load(id) : null;
  if (wanted !== id) return; // another one was asked for meanwhile
  const found = open.get(id) ?? loaded; // it may have been asked something meanwhile
  if (found instanceof Conversation) conversation = found;
  else if (found) conversation = new Conversation(found.meta, found.nodes);
  else conversation = fresh();
  const kept = found ? `#${id}` : location.pathname;
  history.replaceState(null, "", kept);
  useDraft(found ? id : "new");
  shell.closeDrawer();
  draw();
  await drawAll();
  focusQuestion();
}

/** Show what a search has found. */
async function goToHit({ id }, hit, words) {
  await go(id);
  if (conversation.meta.id !== id) return;
  const node = conversation.nodes.get(hit?.id);
  if (!node) return;
  if (!chat.busy(conversation) && conversation.reveal(node)) keepMeta();
  thread.find(node, words);
}

function fresh() {
  const meta = newMeta(systemForNew());
  if (conversation) meta.models = [...conversation.meta.models];
  if (conversation) meta.comparing = conversation.meta.comparing;
  return new Conversation(meta);
}

function send(text) {
  thread.unmark();
  if (!models.length) look();
  const first = conversation.nodes.size === 0;
  if (!chat.ask(conversation, text)) return false;
  if (first) {
    setQuestion("");
    useDraft(conversation.meta.id);
    history.replaceState(null, "", `#${conversation.meta.id}`);
  }
  thread.end();
  return true;
}

function keepMeta() {
  if (conversation.nodes.size) store.put(conversation.meta);
  draw();
}

function compare() {
  if (chat.busy(conversation)) return;
  conversation.compare(!conversation.meta.comparing);
  keepMeta();
}

async function rename({ id }, title) {
  if (title !== null) {
    const own = id === conversation.meta.id ? conversation : open.get(id);
    if (own) Object.assign(own.meta, { title, named: true });
    await store.change(id, { title, named: true });
  }
  draw();
  await drawAll();
}

async function remove(meta) {
  const running = open.get(meta.id);
  if (running) chat.stop(running);
  if (!(await store.change(meta.id, { deleted: Date.now() }))) return;
  if (meta.id === conversation.meta.id) await go(null);
  else await drawAll();
  const undo = async () => {
    await store.change(meta.id, { deleted: null });
    await go(meta.id);
  };
  const forget = () => store.forget(meta.id);
  toast(`Deleted “${meta.title || "Untitled"}”.`, { name: "Undo", act: undo }, forget);
}

/** Answers are over: say them to those who listen. */
function ended(one, answers) {
  if (one !== conversation) return announce(`Answered: ${one.meta.title}`);
  announce(answers.map((node) => thread.spoken(node, answers.length > 1)).join(" "));
}

/** Another tab changed a conversation: take over what it added. */
async function heard(id, listed) {
  if (document.hidden || !conversation) {
    missed.set(id, listed || missed.get(id) === true);
    return;
  }
  if (listed) await drawAll();
  if (id !== conversation.meta.id) return;
  const shown = conversation;
  const found = await store.load(id);
  if (shown !== conversation || found === undefined) return;
  if (!found) {
    if (chat.busy(shown)) shown.erased = true;
    else if (shown.nodes.size) await go(null);
    return;
  }
  for (const node of found.nodes) {
    const own = shown.nodes.get(node.id);
    if (own && !chat.runs.has(own)) {
      Object.assign(own, node, { elsewhere: own.content !== node.content });
    } else if (!own) {
      shown.take(node);
    }
  }
  const { title, named, system } = found.meta;
  Object.assign(shown.meta, { title, named, system });
  draw();
}

/** Ask for the models; while nothing answers, say so and ask again. */
function look() {
  looking ??= (async () => {
    for (let tries = 0; ; tries += 1) {
      try {
        models = await askModels();
        shell.banner(tries ? "The server is back." : null, 4000);
        break;
      } catch (error) {
        const waiting = error.gone ? " Looking for it…" : "";
        shell.banner(error.message + waiting);
        if (!error.gone) break;
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN));
    }
    looking = null;
    draw();
    shelf.look();
  })();
  return looking;
}

onKeyNeeded(shell.askKey);
setUpComposer({
  send,
  stop: () => chat.stop(conversation),
  editLast: () => thread.editLast(),
  drafted: (tokens) => thread.drafted(tokens),
});
const openSettings = setUpSettings({
  opened: () => ({
    system: conversation.meta.system,
    placeholder: /^cerebrum-/.test(chat.modelsOf(conversation)[0]?.id) ? CARD : OWN,
    defaults: chat.modelsOf(conversation)[0]?.defaults,
    length: chat.modelsOf(conversation)[0]?.context_length,
  }),
  saved: (system) => {
    conversation.meta.system = system;
    keepMeta();
  },
});
const search = setUpSearch({ everything: () => store.everything(), go: goToHit });
setUpKeys({
  stop: () => shell.closeDrawer() || chat.stop(conversation),
  fresh: () => go(null),
  compare,
  settings: openSettings,
  list: shell.toggleList,
  help: shell.help,
  search,
});
const openCard = setUpCard({
  now: () => {
    const chosen = chat.modelsOf(conversation).filter(Boolean);
    const paths = conversation.leaves.flatMap((leaf) => conversation.path(leaf));
    const timed = paths.filter((node) => node.stats?.speed);
    const speeds = new Map(timed.map((node) => [node.model, node.stats.speed]));
    const own = conversation.meta.comparing ? chosen : chosen.slice(0, 1);
    return { models: [...new Set(own)], used: thread.used?.used ?? 0, speeds };
  },
  shelf,
  forgotten: (undo) => toast("The votes are forgotten.", { name: "Undo", act: undo }),
});
byId("open-card").addEventListener("click", openCard);
byId("new").addEventListener("click", () => go(null));
byId("compare").addEventListener("click", compare);
byId("open-search").addEventListener("click", search);
byId("open-settings").addEventListener("click", openSettings);
setUpFiles(store, go);
const openExport = setUpExport({
  load: ({ id }) => (id === conversation.meta.id ? conversation : (open.get(id) ?? store.load(id))),
  show: (id) => (id === conversation.meta.id ? null : go(id)),
});
setUpCopy(byId("thread"));
for (const lane of [0, 1]) {
  byId(`model-${lane}`).addEventListener("change", ({ target }) => {
    if (target.value.startsWith(SHELF)) {
      const id = target.value.slice(SHELF.length);
      loadFor = { id, lane, conversation };
      shelf.load(id);
      draw(); // until it is there, the one before answers
      return;
    }
    conversation.meta.models = conversation.meta.models.with(lane, target.value);
    keepMeta();
  });
}
for (const text of EXAMPLES) {
  const use = () => {
    setQuestion(text);
    byId("question").focus();
  };
  byId("examples").append(h("li", {}, h("button", { type: "button", onclick: use }, text)));
}
addEventListener("pagehide", () => store.saveNow(chat.growing()));
function catchUp() {
  if (document.hidden) return;
  const all = [...missed];
  missed.clear();
  for (const [id, listed] of all) heard(id, listed);
}
document.addEventListener("visibilitychange", catchUp);
addEventListener("hashchange", () => go(location.hash.slice(1)));
store.listen(heard);
await go(location.hash.slice(1));
catchUp();
await look();
