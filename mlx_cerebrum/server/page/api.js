// Talking to the server: models, one streamed answer, errors as one line, the key.

const KEY = "cerebrum.key";
const GONE = "The server does not answer. Is it still running?";

/** One line for the reader. `wait`: seconds the server asked for; `gone`: nothing answered. */
export class ApiError extends Error {
  constructor(message, { wait = null, gone = false, status = null } = {}) {
    super(message);
    this.wait = wait;
    this.gone = gone;
    this.status = status;
  }
}

let heldKey = null; // where the browser stores nothing
let asking = null; // one question for the key at a time, whoever needs it
let askForKey = async () => null;

/** `ask(refused)` shows a dialog; it resolves to a key, or to null where none was given. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

function keptKey() {
  try {
    return sessionStorage.getItem(KEY) ?? heldKey;
  } catch {
    return heldKey;
  }
}

function keepKey(key) {
  heldKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it holds until the page is closed
  }
}

async function newKey(sent) {
  if (keptKey() !== sent) return keptKey(); // given meanwhile, for another request
  asking ??= askForKey(sent !== null).finally(() => (asking = null));
  const key = await asking;
  if (key !== null) keepKey(key);
  return key;
}

async function request(path, options = {}) {
  for (;;) {
    const key = keptKey();
    const headers = { ...options.headers };
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(GONE, { gone: true });
    }
    if (response.status === 401) {
      if ((await newKey(key)) === null) throw new ApiError("This server needs its API key.");
      options.signal?.throwIfAborted();
      continue;
    }
    if (!response.ok) throw await failure(response);
    return response;
  }
}

async function failure(response) {
  let said = null;
  try {
    said = (await response.json()).error.message;
  } catch {
    // not OpenAI's shape; the status says it
  }
  const message = said ? oneLine(said) : `The server answered with status ${response.status}.`;
  const header = response.headers.get("Retry-After");
  const wait = header !== null && /^\d{1,5}$/.test(header.trim()) ? Number(header) : null;
  const { status } = response;
  if (status !== 429) return new ApiError(message, { wait, status });
  return new ApiError(said ? message : "The server is busy.", { wait: wait ?? 5 });
}

function oneLine(value) {
  return String(value).replace(/\s+/g, " ").trim().slice(0, 500);
}

/**
 * The models by name, the default first; `cerebrum` holds what is known of each, `defaults` what
 * answers are drawn by where a request does not say.
 */
export async function models() {
  const response = await request("v1/models");
  try {
    const { data } = await response.json();
    return data.map(({ id, cerebrum, defaults }) => ({ ...cerebrum, defaults, id: String(id) }));
  } catch {
    throw new ApiError("The server's list of models can't be read.");
  }
}

/** The models on the server's shelf and its machine; null where it has no shelf. */
export async function shelf() {
  try {
    const response = await request("shelf");
    const { models: all, machine } = await response.json();
    const sound = (row) => typeof row?.id === "string" && typeof row.state === "string";
    return { models: all.filter(sound), machine: typeof machine === "string" ? machine : null };
  } catch (error) {
    if (error.status === 404) return null;
    throw error instanceof ApiError ? error : new ApiError("The server's shelf can't be read.");
  }
}

/** Have a model loaded from the shelf; that it was begun is all that is known then. */
export async function loadFromShelf(id) {
  const body = JSON.stringify({ id });
  const headers = { "Content-Type": "application/json" };
  await request("shelf/load", { method: "POST", headers, body });
}

/** What the server makes of formulas and code: as many answers as jobs, null where there is none. */
export async function typeset(jobs) {
  const response = await request("typeset", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ jobs }),
  });
  const { answers } = await response.json();
  return answers;
}

/** The lines of a stream of bytes. */
async function* linesOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const text = done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = text.split("\n");
      lines[0] = rest + lines[0];
      rest = lines.pop();
      for (const line of lines) yield line.endsWith("\r") ? line.slice(0, -1) : line;
      if (done) break;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * One answer. `onComment("loading" or "reading", done, total)` while a model that was at rest
 * is loaded and while the prompt is read, `onText(piece)` for each piece.
 * Resolves to { finish, usage }; rejects with ApiError, or AbortError where `signal` stopped it.
 */
export async function answer(body, { signal, onComment, onText }) {
  const all = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(all),
    signal,
  });
  const broke = "The answer broke off: the server closed the connection.";
  const result = { finish: null, usage: null };
  let over = false;
  try {
    for await (const line of linesOf(response.body)) {
      const told = /^: ?(reading|loading) (\d+)\/(\d+)/.exec(line);
      if (told) onComment(told[1], Number(told[2]), Number(told[3]));
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      over ||= data === "[DONE]";
      if (over) break;
      take(data, result, onText);
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(broke, { gone: true });
  }
  signal?.throwIfAborted();
  if (!over && result.finish === null) throw new ApiError(broke, { gone: true });
  return result;
}

function take(data, result, onText) {
  let event;
  try {
    event = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is no JSON.");
  }
  if (event?.error) throw new ApiError(oneLine(event.error.message ?? "The server failed."));
  if (event?.usage) result.usage = event.usage;
  const choice = event?.choices?.[0];
  if (typeof choice?.delta?.content === "string" && choice.delta.content) {
    onText(choice.delta.content);
  }
  result.finish = choice?.finish_reason ?? result.finish;
}
