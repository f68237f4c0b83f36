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

const nodesOf = (id) => IDBKeyRange.bound([id], [id, []]);

/** The browser's database; `onfail(error)` is told of what could not be kept. */
export class Store {
  static async open(onfail) {
    try {
      const store = new Store(await open(), onfail);
      await store.rescue();
      await store.forget();
      return store;
    } catch (error) {
      onfail(error);
      return new MemoryStore();
    }
  }

  constructor(database, onfail) {
    this.database = database;
    this.onfail = onfail;
    this.channel = new BroadcastChannel(NAME);
    database.onversionchange = () => database.close();
    database.onclose = () => onfail(new Error("closed")); // its data were cleared
  }

  /** `heard(id)`: another tab changed that conversation. */
  listen(heard) {
    this.channel.onmessage = ({ data }) => heard(data);
  }

  /** Every conversation's meta, the one changed last first. */
  async list() {
    let all = [];
    try {
      all = await done(this.transaction("readonly").conversations.getAll());
    } catch (error) {
      this.onfail(error);
    }
    return all.filter((meta) => !meta.deleted).sort((a, b) => b.updated - a.updated);
  }

  /** { meta, nodes }, or null where there is no such conversation. */
  async load(id) {
    const { conversations, nodes } = this.transaction("readonly");
    const [meta, found] = await Promise.all([
      done(conversations.get(id)),
      done(nodes.getAll(nodesOf(id))),
    ]);
    return meta && !meta.deleted ? { meta, nodes: found } : null;
  }

  /** Keep a conversation's meta and those of its messages that changed. */
  async put(meta, changed = []) {
    try {
      const { conversations, nodes, finished } = this.transaction("readwrite");
      conversations.put(structuredClone(meta));
      for (const node of changed) nodes.put(structuredClone(node));
      await finished;
      this.channel.postMessage(meta.id);
    } catch (error) {
      this.onfail(error);
    }
  }

  /** Keep messages as they grow, unless their conversation was deleted. */
  async putNodes(id, changed) {
    try {
      const { conversations, nodes, finished } = this.transaction("readwrite");
      if (await done(conversations.get(id))) for (const node of changed) nodes.put({ ...node });
      await finished;
      this.channel.postMessage(id);
    } catch (error) {
      this.onfail(error);
    }
  }

  /** Add what is missing of an imported conversation; what is there stays as it is. */
  async merge({ meta, nodes: wanted }) {
    const { conversations, nodes, finished } = this.transaction("readwrite");
    const there = await done(conversations.get(meta.id));
    const keys = await done(nodes.getAllKeys(nodesOf(meta.id)));
    const known = new Set(keys.map((key) => key.at(-1)));
    conversations.put(there && !there.deleted ? there : meta);
    for (const node of wanted) if (!known.has(node.id)) nodes.put(node);
    await finished;
    this.channel.postMessage(meta.id);
  }

  /** Take a conversation off the list, or put it back. */
  async setDeleted(id, deleted) {
    const { conversations, finished } = this.transaction("readwrite");
    const meta = await done(conversations.get(id));
    if (meta) conversations.put({ ...meta, deleted: deleted ? Date.now() : null });
    await finished;
    this.channel.postMessage(id);
  }

  /** Erase what was deleted a while ago, and what was deleted of `atOnce`. */
  async forget(atOnce = null) {
    const { conversations, nodes, finished } = this.transaction("readwrite");
    for (const meta of await done(conversations.getAll())) {
      const old = meta.deleted && meta.deleted < Date.now() - FORGET_AFTER;
      if (!old && !(meta.deleted && meta.id === atOnce)) continue;
      conversations.delete(meta.id);
      nodes.delete(nodesOf(meta.id));
    }
    await finished;
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
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(RESCUE));
    for (const key of keys) {
      let node = null;
      try {
        node = JSON.parse(localStorage.getItem(key));
      } catch {
        // not ours, then
      }
      const there = node && (await this.load(node.conversation));
      const kept = there?.nodes.find(({ id }) => id === node.id)?.content ?? "";
      if (there && kept.length <= node.content.length) await this.put(there.meta, [node]);
      localStorage.removeItem(key);
    }
  }

  transaction(mode) {
    const transaction = this.database.transaction(["conversations", "nodes"], mode);
    const finished = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    finished.catch(() => {}); // the one who awaits it hears of it
    return {
      conversations: transaction.objectStore("conversations"),
      nodes: transaction.objectStore("nodes"),
      finished,
    };
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
    const metas = [...this.all.values()].map(({ meta }) => meta);
    return metas.filter((meta) => !meta.deleted).sort((a, b) => b.updated - a.updated);
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
  }

  async setDeleted(id, deleted) {
    const one = this.all.get(id);
    if (one) one.meta.deleted = deleted ? Date.now() : null;
  }

  async forget(atOnce) {
    if (this.all.get(atOnce)?.meta.deleted) this.all.delete(atOnce);
  }
}
