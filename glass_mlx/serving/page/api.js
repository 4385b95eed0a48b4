// The server's API, with words for everything that can go wrong.

const KEY = "glass.key"; // in the session's storage: the key is forgotten with the tab

/** A failure in words. `kind`: "gone", "key", "busy" or "refused". */
export class Failure extends Error {
  constructor(words, kind) {
    super(words);
    this.kind = kind;
  }
}

let unkept = ""; // where the browser has no storage for this page

export function getKey() {
  try {
    return sessionStorage.getItem(KEY) ?? unkept;
  } catch {
    return unkept;
  }
}

export function setKey(key) {
  unkept = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it lasts until the page is closed
  }
}

/** The server's status, with the place in its queue of who asks as this user. */
export async function getStatus(user) {
  return (await ask(`/v1/status?${new URLSearchParams({ user })}`, { signal: AbortSignal.timeout(10_000) })).json();
}

/** Have a model's ranks measured, or end that. */
export async function measure(model) {
  return (await ask(`/v1/measure?${new URLSearchParams({ model })}`, { method: "POST" })).json();
}

export async function stopMeasuring() {
  return (await ask("/v1/measure", { method: "DELETE" })).json();
}

export async function getModels() {
  return (await (await ask("/v1/models", { signal: AbortSignal.timeout(30_000) })).json()).data;
}

/** The events of a streamed answer. */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(asked), signal });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = parsed(data);
    if (event.error) throw new Failure(sentence(event.error.message), "refused");
    yield event;
  }
  throw new Failure("The connection to the server broke in the middle of the answer.", "gone");
}

async function ask(path, options) {
  const key = getKey();
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (e) {
    if (options.signal?.aborted && e.name === "AbortError") throw e;
    throw new Failure("The server cannot be reached. Is it still running?", "gone");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw refusal(response.status, sentence(said?.error?.message), key);
}

function refusal(status, said, key) {
  switch (status) {
    case 401:
      return new Failure(key ? "The server does not accept this API key." : "This server asks for an API key.", "key");
    case 413:
      return new Failure("This conversation has become too large for the server. Begin a new one.", "refused");
    case 429:
      return new Failure("The server is busy: too many requests are waiting. Try again in a moment.", "busy");
  }
  return new Failure(said || `The server answered with status ${status}.`, "refused");
}

function sentence(message) {
  return typeof message === "string" ? message.slice(0, 1000) : "";
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("The server sent something that is not an answer.", "refused");
  }
}

/** The data of server-sent events. */
async function* events(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const lines = text.split("\n");
      text = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim(); // others keep the connection alive
      }
    }
  } catch (e) {
    if (signal.aborted || e instanceof Failure) throw e;
    throw new Failure("The connection to the server broke in the middle of the answer.", "gone");
  } finally {
    reader.cancel().catch(() => {});
  }
}
