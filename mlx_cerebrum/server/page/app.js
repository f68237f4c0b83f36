// The page: puts its parts together.

import { models as askModels, onKeyNeeded } from "./api.js";
import { Chat } from "./chat.js";
import { focusQuestion, setBusy, setQuestion, setUpComposer, setUpKeys, useDraft } from "./composer.js";
import { Conversation, newMeta } from "./conversation.js";
import { byId, h } from "./dom.js";
import { FileError, backupFile, download, messagesFile, parseFile } from "./files.js";
import { drawList, toast } from "./list.js";
import { setUpSettings, systemForNew } from "./settings.js";
import { setUpShell } from "./shell.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";

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
let looking = null; // the search for a server that is gone
const open = new Map(); // conversations with an answer on its way, by id

const store = await Store.open(() => {
  toast("This browser does not keep conversations now: they last until the page is closed.");
});
const chat = new Chat(store, {
  changed,
  grew: (node) => thread.grew(node),
  lost: () => look(),
  models: () => models,
});
const actions = {
  retry: (node) => {
    chat.retry(conversation, node);
    focusQuestion(); // the button is gone, with the answer it belonged to
  },
  edit: (node, text) => {
    const taken = chat.edit(conversation, node, text);
    if (taken) focusQuestion();
    return taken;
  },
  step: (node, by) => thread.focusVersion(chat.step(conversation, node, by), by),
  keep: (lane) => chat.keep(conversation, lane),
  busy: (one) => chat.busy(one),
  waitOf: (node) => chat.waits.get(node),
};
const thread = new Thread(actions, (node) => chat.runs.get(node));
const shell = setUpShell();

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
    select.replaceChildren(...models.map(({ id }) => h("option", { value: id }, id)));
    select.value = chosen[lane]?.id ?? "";
    select.disabled = chat.busy(conversation) || !models.length;
  }
  byId("model-0").setAttribute("aria-label", meta.comparing ? "First model" : "Model");
  byId("model-1").hidden = byId("against").hidden = !meta.comparing;
  byId("compare").setAttribute("aria-pressed", String(meta.comparing));
  byId("compare").disabled = chat.busy(conversation);
  byId("about").textContent = aboutModels(meta.comparing ? chosen : chosen.slice(0, 1));
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
  drawList(metas, conversation.meta.id, { open: (meta) => go(meta.id), rename, save, remove });
}

/** Show a conversation, or a new one. */
async function go(id) {
  wanted = id;
  const found = id ? (open.get(id) ?? (await store.load(id))) : null;
  if (wanted !== id) return; // another one was asked for meanwhile
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

function fresh() {
  const meta = newMeta(systemForNew());
  if (conversation) meta.models = [...conversation.meta.models];
  if (conversation) meta.comparing = conversation.meta.comparing;
  return new Conversation(meta);
}

function send(text) {
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

async function rename(meta, title) {
  const { meta: own } = meta.id === conversation.meta.id ? conversation : { meta };
  if (title !== null) {
    Object.assign(own, { title, named: true });
    await store.put(own);
  }
  draw();
  await drawAll();
}

async function save(meta) {
  const found = open.get(meta.id) ?? (await store.load(meta.id));
  if (found) download(messagesFile(new Conversation(found.meta, [...found.nodes.values()])));
}

async function remove(meta) {
  const running = open.get(meta.id);
  if (running) chat.stop(running);
  await store.setDeleted(meta.id, true);
  if (meta.id === conversation.meta.id) await go(null);
  else await drawAll();
  const undo = async () => {
    await store.setDeleted(meta.id, false);
    await go(meta.id);
  };
  const forget = () => store.forget(meta.id);
  toast(`Deleted “${meta.title || "Untitled"}”.`, { name: "Undo", act: undo }, forget);
}

async function takeFiles(files) {
  let last = null;
  let count = 0;
  for (const file of files) {
    try {
      for (const one of parseFile(await file.text(), file.name)) {
        await store.merge(one);
        last = one.meta.id;
        count += 1;
      }
    } catch (error) {
      const known = error instanceof FileError;
      toast(known ? error.message : `${file.name} can't be read: ${error.message}`);
      return;
    }
  }
  if (last) await go(last);
  if (count) toast(count === 1 ? "Imported one conversation." : `Imported ${count} conversations.`);
}

async function backup() {
  const metas = await store.list();
  download(backupFile((await Promise.all(metas.map(({ id }) => store.load(id)))).filter(Boolean)));
}

/** Another tab changed a conversation: take over what it added. */
async function heard(id) {
  await drawAll();
  if (id !== conversation.meta.id) return;
  const shown = conversation;
  const found = await store.load(id);
  if (shown !== conversation) return;
  if (!found) {
    if (!chat.busy(shown) && shown.nodes.size) await go(null);
    return;
  }
  for (const node of found.nodes) {
    const own = shown.nodes.get(node.id);
    if (own && !chat.runs.has(own)) {
      Object.assign(own, node, { elsewhere: own.content !== node.content });
    }
    else if (!own) shown.nodes.set(node.id, node);
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
  })();
  return looking;
}

onKeyNeeded(shell.askKey);
setUpComposer({ send, stop: () => chat.stop(conversation), editLast: () => thread.editLast() });
const openSettings = setUpSettings({
  opened: () => ({
    system: conversation.meta.system,
    placeholder: /^cerebrum-/.test(chat.modelsOf(conversation)[0]?.id) ? CARD : OWN,
  }),
  saved: (system) => {
    conversation.meta.system = system;
    keepMeta();
  },
});
setUpKeys({
  stop: () => (chat.busy(conversation) ? chat.stop(conversation) : shell.closeDrawer()),
  fresh: () => go(null),
  compare,
  settings: openSettings,
  list: shell.toggleList,
  help: shell.help,
});
byId("new").addEventListener("click", () => go(null));
byId("compare").addEventListener("click", compare);
byId("open-settings").addEventListener("click", openSettings);
byId("backup").addEventListener("click", backup);
byId("import").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", async ({ target }) => {
  await takeFiles([...target.files]);
  target.value = "";
});
for (const lane of [0, 1]) {
  byId(`model-${lane}`).addEventListener("change", ({ target }) => {
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
addEventListener("hashchange", () => go(location.hash.slice(1)));
store.listen(heard);
await go(location.hash.slice(1));
await look();
