// Conversations and settings in the browser's storage: each conversation has its own key, so that tabs do not
// overwrite each other and a damaged one does not spoil the rest.
//
// A conversation is {id, title, system, changed, turns}; a turn is what was said and one or two answers to it:
// {said, answers: [{kind: "glass" | "dense", density, quality, verify, model, text, reasoning, finish, error, figures}]}.
// A density of 0 is the server's own, or the one of the quality.

const CHAT = "glass.chat.";
const SETTINGS = "glass.settings";
const QUALITIES = ["high", "balanced", "fast"];
const DEFAULTS = { model: "", mode: "glass", density: 0, quality: "", verify: false, system: "", sampling: {} };
const NUMBERS = { tps: 0, kept: 0, total: 0, tokens: 0 };
const OPTIONAL = { agreement: null, drafted: null, context: null };

const chats = new Map();

/** All conversations, the latest first. */
export function all() {
  return [...chats.values()].sort((a, b) => b.changed - a.changed);
}

/** Read what is stored; conversations in `keep` are newer here than there. */
export function load(keep = []) {
  const kept = new Map(keep.map((chat) => [chat.id, chat]));
  chats.clear();
  for (const key of keys()) {
    const chat = restored(read(key));
    if (chat && key === CHAT + chat.id) chats.set(chat.id, kept.get(chat.id) ?? chat);
  }
  for (const chat of keep) chats.set(chat.id, chat);
}

export function create(system) {
  const id = crypto.getRandomValues(new Uint32Array(3)).join("-");
  return { id, title: "", system, changed: Date.now(), turns: [] };
}

/** An answer to be, by how it is to be made. */
export function answer({ kind, density = 0, quality = "", verify = false }) {
  const how = kind === "dense" ? { kind, density: 100, quality: "", verify: false } : { kind, density, quality, verify };
  return { ...how, model: "", text: "", reasoning: "", finish: "", error: "", figures: null };
}

/** What a browser's file of conversations holds. */
export function exported() {
  return { format: "glass_mlx conversations", version: 1, conversations: all() };
}

/** Add the conversations of such a file. Of one that is here too, the one that was changed last stays.
 * Returns how many were added; null if it is not such a file. */
export function imported(file) {
  if (!Array.isArray(file?.conversations)) return null;
  const found = file.conversations.map(restored).filter((one) => one?.turns.length);
  const added = found.filter((one) => !(chats.get(one.id)?.changed >= one.changed));
  added.forEach(save);
  return added.length;
}

/** Keep a conversation; false if the browser has no room for it. */
export function save(chat) {
  chats.set(chat.id, chat);
  return write(CHAT + chat.id, chat);
}

export function remove(chat) {
  chats.delete(chat.id);
  forget(CHAT + chat.id);
}

export function removeAll() {
  chats.clear();
  for (const key of keys()) forget(key);
}

export function settings() {
  const found = read(SETTINGS);
  const made = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) {
    if (typeof found?.[name] === typeof DEFAULTS[name]) made[name] = found[name];
  }
  if (!["glass", "dense", "both"].includes(made.mode)) made.mode = DEFAULTS.mode;
  if (!(made.density >= 10 && made.density <= 100)) made.density = DEFAULTS.density;
  if (!QUALITIES.includes(made.quality)) made.quality = DEFAULTS.quality;
  const numbers = Object.entries(made.sampling ?? {}).filter(([, value]) => Number.isFinite(value));
  made.sampling = Object.fromEntries(numbers);
  return made;
}

export function saveSettings(made) {
  return write(SETTINGS, made);
}

/** The conversation that this tab shows. */
export function current() {
  try {
    return chats.get(sessionStorage.getItem("glass.current"));
  } catch {
    return undefined;
  }
}

export function setCurrent(chat) {
  try {
    sessionStorage.setItem("glass.current", chat.id);
  } catch {
    // then a reload begins a new one
  }
}

function restored(raw) {
  if (!raw || typeof raw.id !== "string" || !Array.isArray(raw.turns)) return null;
  const turns = raw.turns.map(restoredTurn).filter(Boolean);
  const changed = Number.isFinite(raw.changed) ? raw.changed : 0;
  return { id: raw.id, title: text(raw.title), system: text(raw.system), changed, turns };
}

function restoredTurn(raw) {
  if (typeof raw?.said !== "string" || !Array.isArray(raw.answers)) return null;
  return { said: raw.said, answers: raw.answers.filter(Boolean).slice(0, 2).map(restoredAnswer) };
}

function restoredAnswer(raw) {
  const { kind, density, quality, verify, figures } = raw;
  const made = answer({
    kind: kind === "dense" ? "dense" : "glass",
    density: Number.isFinite(density) ? density : 0,
    quality: QUALITIES.includes(quality) ? quality : "",
    verify: verify === true,
  });
  for (const name of ["model", "text", "reasoning", "finish", "error"]) made[name] = text(raw[name]);
  if (figures && Object.keys(NUMBERS).every((name) => Number.isFinite(figures[name]))) {
    const names = Object.keys({ ...NUMBERS, ...OPTIONAL });
    made.figures = Object.fromEntries(names.map((name) => [name, Number.isFinite(figures[name]) ? figures[name] : null]));
  }
  made.finish ||= "stopped"; // the page was closed in the middle
  return made;
}

const text = (value) => (typeof value === "string" ? value : "");

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(CHAT));
  } catch {
    return []; // switched off
  }
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function forget(key) {
  try {
    localStorage.removeItem(key);
  } catch {
    // nothing was stored either
  }
}
