// Conversations out to files, and in from them.

import { Conversation } from "./conversation.js";
import { byId, plural } from "./dom.js";
import { FileError, backupFile, download, messagesFile, readFile } from "./files.js";
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

/** One conversation as the list of messages that is shown of it. */
export function saveFile({ meta, nodes }) {
  download(messagesFile(new Conversation(meta, [...nodes.values()])));
}
