// Conversations out to files and to paper, and in from files.

import { Conversation } from "./conversation.js";
import { byId, plural } from "./dom.js";
import { FileError, backupFile, download, markdownFile, messagesFile, readFile } from "./files.js";
import { toast } from "./list.js";

/** Wire the buttons up; `go(id)` shows a conversation. */
export function setUpFiles(store, go) {
  /** Every file that is sound is taken, whatever the others are; of those the first is told. */
  async function take(files) {
    let last = null;
    let count = 0;
    let wrong = "";
    for (const file of files) {
      try {
        for (const one of await readFile(file)) {
          if (!(await store.merge(one))) return; // the store has said why
          last = one.meta.id;
          count += 1;
        }
      } catch (error) {
        wrong ||= error instanceof FileError ? error.message : `${file.name}: ${error.message}`;
      }
    }
    if (last) await go(last);
    const said = count ? `Imported ${plural(count, "conversation")}.` : "";
    if (said || wrong) toast([said, wrong].filter(Boolean).join(" "));
  }

  byId("sidebar").addEventListener("drop", ({ dataTransfer }) => {
    if (dataTransfer?.files.length) take([...dataTransfer.files]); // composer.js keeps the page here
  });
  byId("backup").addEventListener("click", async () => {
    const metas = await store.list();
    const all = await Promise.all(metas.map(({ id }) => store.load(id)));
    download(backupFile(all.filter(Boolean)));
  });
  byId("import").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async ({ target }) => {
    await take([...target.files]);
    target.value = "";
  });
}

/**
 * Wire the export's dialog up; returns what opens it for a conversation. `load(meta)`: that with
 * its messages; `show(id)` puts it on the screen, which is what is printed.
 */
export function setUpExport({ load, show }) {
  const dialog = byId("export");
  let meta = null;
  const act = (id, write) => {
    byId(id).addEventListener("click", async () => {
      dialog.close();
      const found = await load(meta);
      if (found) await write(new Conversation(found.meta, [...found.nodes.values()]));
    });
  };
  act("export-markdown", (conversation) => download(markdownFile(conversation)));
  act("export-json", (conversation) => download(messagesFile(conversation)));
  act("export-print", async (conversation) => {
    await show(conversation.meta.id);
    // A frame, so that all there is to print is drawn.
    requestAnimationFrame(() => requestAnimationFrame(() => print()));
  });
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("#thread details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });
  return (one) => {
    meta = one;
    byId("export-name").textContent = meta.title || "Untitled";
    dialog.showModal();
  };
}
