// Conversations kept in this browser. Every message is a record of its own, so that two tabs in
// one conversation add branches to it instead of overwriting each other's.

const NAME = "cerebrum";
const RESCUE = "cerebrum.rescue.";
const FORGET_AFTER = 60_000; // milliseconds a deleted conversation can be had back

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("nodes", { keyPath: ["conversation", "id"] });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

function newestFirst(metas) {
  return metas.filter((meta) => !meta.deleted).sort((a, b) => b.updated - a.updated);
}

const nodesOf = (id) => IDBKeyRange.bound([id], [id, []]);

/**
 * The browser's database. `onfail(error)` is told of what could not be kept, and nothing throws;
 * `reopened()` is called where the database was gone and is there again, perhaps empty.
 */
export class Store {
  static async open({ onfail, reopened }) {
    let store;
    try {
      store = new Store(await open(), { onfail, reopened });
    } catch (error) {
      onfail(error);
      return new MemoryStore();
    }
    await store.rescue();
    await store.forget();
    return store;
  }

  constructor(database, { onfail, reopened }) {
    this.onfail = onfail;
    this.reopened = reopened;
    this.channel = new BroadcastChannel(NAME);
    this.use(database);
  }

  use(database) {
    this.database = database;
    database.onversionchange = () => database.close();
  }

  /** `heard(id, listed)`: another tab changed that conversation, or what the list says of it. */
  listen(heard) {
    this.channel.onmessage = ({ data }) => heard(data.id, data.listed);
  }

  tell(id, listed = true) {
    this.channel.postMessage({ id, listed });
  }

  /** Do something in a transaction; resolves to `otherwise` where that fails. */
  async attempt(mode, act, otherwise = false) {
    try {
      try {
        return await this.once(mode, act);
      } catch (error) {
        if (error.name !== "InvalidStateError") throw error;
      }
      // Closed: the data were cleared, or the system took the connection away, as iOS does.
      this.opening ??= open().finally(() => (this.opening = null));
      this.use(await this.opening);
      const found = await this.once(mode, act);
      this.reopened();
      return found;
    } catch (error) {
      this.onfail(error);
      return otherwise;
    }
  }

  async once(mode, act) {
    const transaction = this.database.transaction(["conversations", "nodes"], mode);
    const finished = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error ?? new Error("aborted"));
    });
    finished.catch(() => {}); // it is awaited below, unless `act` fails first
    const [metas, nodes] = ["conversations", "nodes"].map((name) => transaction.objectStore(name));
    const found = await act(metas, nodes);
    await finished;
    return found ?? true;
  }

  /** Every conversation's meta, the one changed last first. */
  async list() {
    const all = await this.attempt("readonly", (metas) => done(metas.getAll()), []);
    return newestFirst(all);
  }

  /** Every conversation's meta, the one changed last first, and every message. */
  async everything() {
    const read = (metas, nodes) => Promise.all([done(metas.getAll()), done(nodes.getAll())]);
    const [metas, nodes] = await this.attempt("readonly", read, [[], []]);
    return { metas: newestFirst(metas), nodes };
  }

  /** { meta, nodes }; null where there is no such conversation, undefined where that is unknown. */
  async load(id) {
    const read = (metas, nodes) => {
      return Promise.all([done(metas.get(id)), done(nodes.getAll(nodesOf(id)))]);
    };
    const found = await this.attempt("readonly", read);
    if (!found) return undefined;
    const [meta, all] = found;
    return meta && !meta.deleted ? { meta, nodes: all } : null;
  }

  /** Keep a conversation's meta and those of its messages that changed. */
  async put(meta, changed = []) {
    const kept = await this.attempt("readwrite", (metas, nodes) => {
      metas.put(structuredClone(meta));
      for (const node of changed) nodes.put(structuredClone(node));
    });
    if (kept) this.tell(meta.id);
  }

  /** Keep messages as they grow, unless their conversation was erased. */
  async putNodes(id, changed) {
    const kept = await this.attempt("readwrite", async (metas, nodes) => {
      if (await done(metas.get(id))) for (const node of changed) nodes.put({ ...node });
    });
    if (kept) this.tell(id, false);
  }

  /** Add what is missing of an imported conversation, leaving what is there. True if kept. */
  async merge({ meta, nodes: wanted }) {
    const kept = await this.attempt("readwrite", async (metas, nodes) => {
      const there = await done(metas.get(meta.id));
      const keys = await done(nodes.getAllKeys(nodesOf(meta.id)));
      const known = new Set(keys.map((key) => key.at(-1)));
      metas.put(there && !there.deleted ? there : meta);
      for (const node of wanted) if (!known.has(node.id)) nodes.put(node);
    });
    if (kept) this.tell(meta.id);
    return kept;
  }

  /** Change some of a conversation's meta: its name, or when it was deleted. */
  async change(id, changes) {
    const kept = await this.attempt("readwrite", async (metas) => {
      const meta = await done(metas.get(id));
      if (meta) metas.put({ ...meta, ...changes });
    });
    if (kept) this.tell(id);
    return kept;
  }

  /** Erase what was deleted a while ago, and what was deleted of `atOnce`. */
  async forget(atOnce = null) {
    await this.attempt("readwrite", async (metas, nodes) => {
      for (const meta of await done(metas.getAll())) {
        const old = meta.deleted && meta.deleted < Date.now() - FORGET_AFTER;
        if (!old && !(meta.deleted && meta.id === atOnce)) continue;
        metas.delete(meta.id);
        nodes.delete(nodesOf(meta.id));
      }
    });
  }

  /** Called while the page goes away: only localStorage is sure to be written by then. */
  saveNow(nodes) {
    for (const node of nodes) {
      try {
        localStorage.setItem(RESCUE + node.id, JSON.stringify(node));
      } catch {
        // full: what was kept a moment ago has to do
      }
    }
  }

  /** What `saveNow` wrote when a page went away goes where it belongs. */
  async rescue() {
    let keys = [];
    try {
      keys = Object.keys(localStorage).filter((key) => key.startsWith(RESCUE));
    } catch {
      // switched off: then nothing was written either
    }
    for (const key of keys) {
      let node = null;
      try {
        node = JSON.parse(localStorage.getItem(key));
      } catch {
        // not ours, then
      }
      if (typeof node?.content === "string") await this.rescueOne(node);
      localStorage.removeItem(key);
    }
  }

  /** Only in place of less of the same answer: one that went on to its end stays as it is. */
  async rescueOne(node) {
    await this.attempt("readwrite", async (metas, nodes) => {
      const [meta, kept] = await Promise.all([
        done(metas.get(String(node.conversation))),
        done(nodes.get([String(node.conversation), String(node.id)])),
      ]);
      const growing = kept?.state === "partial" && kept.content.length <= node.content.length;
      const less = !kept || growing;
      if (meta && less) nodes.put(node);
    });
  }
}

/** Where the browser keeps nothing: conversations live as long as the page. */
class MemoryStore {
  constructor() {
    this.all = new Map();
  }

  listen() {}
  saveNow() {}

  async list() {
    return newestFirst([...this.all.values()].map(({ meta }) => meta));
  }

  async everything() {
    const nodes = [...this.all.values()].flatMap((one) => [...one.nodes.values()]);
    return { metas: await this.list(), nodes };
  }

  async load(id) {
    const one = this.all.get(id);
    return one && !one.meta.deleted ? { meta: one.meta, nodes: [...one.nodes.values()] } : null;
  }

  async put(meta, changed = []) {
    const one = this.all.get(meta.id) ?? { nodes: new Map() };
    this.all.set(meta.id, { ...one, meta });
    for (const node of changed) one.nodes.set(node.id, node);
  }

  async putNodes(id, changed) {
    const one = this.all.get(id);
    for (const node of changed) one?.nodes.set(node.id, node);
  }

  async merge({ meta, nodes }) {
    const one = this.all.get(meta.id);
    const missing = nodes.filter((node) => !one?.nodes.has(node.id));
    await this.put(one && !one.meta.deleted ? one.meta : meta, missing);
    return true;
  }

  async change(id, changes) {
    const one = this.all.get(id);
    if (one) Object.assign(one.meta, changes);
    return true;
  }

  async forget(atOnce) {
    if (this.all.get(atOnce)?.meta.deleted) this.all.delete(atOnce);
  }
}
