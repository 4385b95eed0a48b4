// The chat page: what is shown, what is asked of the server, and the keyboard.

import { Failure, chat as stream, getModels, getStatus, setKey } from "./api.js";
import * as store from "./store.js";
import { make, turnView } from "./view.js";

const $ = (id) => document.getElementById(id);
const APPLE = /Mac|iPhone|iPad/.test(navigator.platform);
const EXAMPLES = [
  "I want to find a restaurant in San Jose.",
  "What is the weather like today?",
  "I need a hotel in London.",
];

store.load();
const settings = store.settings();
let chat = store.current() ?? store.create(settings.system);
let views = new Map(); // of the answers that are shown
let running = null; // {chat, answer, controller, since} while an answer is awaited
let status = null; // the server's, null while it cannot be had
let reachable = true;

// ---- What is shown

function showChat(chosen) {
  chat = chosen;
  store.setCurrent(chat);
  views = new Map();
  $("turns").replaceChildren(...chat.turns.map(addViews));
  const system = chat.system.trim();
  if (system) $("turns").prepend(make("p", { className: "system" }, `System prompt: ${system}`));
  showWelcome();
  showList();
  scrollDown();
  if (running?.chat === chat) views.get(running.answer)?.update(waiting());
}

function addViews(turn) {
  const view = turnView(turn, again);
  turn.answers.forEach((answer, i) => views.set(answer, view.views[i]));
  return view.element;
}

function showWelcome() {
  $("welcome").hidden = chat.turns.length > 0;
  $("examples").hidden = $("model").value !== "demo"; // it knows little else
}

function showList() {
  const items = store.all().map((one) => {
    const title = one.title || "New chat";
    const open = make("button", { type: "button", className: "open", onclick: () => openChat(one) }, title);
    if (one === chat) open.setAttribute("aria-current", "true");
    if (running?.chat === one) open.append(make("span", { className: "hidden" }, " (answering)"));
    open.classList.toggle("busy", running?.chat === one);
    const remove = make("button", { type: "button", className: "icon delete", onclick: () => removeChat(one) }, "×");
    remove.setAttribute("aria-label", `Delete ${title}`);
    return make("li", {}, open, remove);
  });
  $("chats").replaceChildren(...items);
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("log").setAttribute("aria-busy", String(running !== null));
  showList();
}

// Messages about the page itself, one for each topic, until they are over.
const notices = new Map();

function notice(topic, words, action) {
  if (notices.get(topic)?.words === words) return;
  if (words) notices.set(topic, { words, action });
  else if (!notices.delete(topic)) return;
  const lines = [...notices].map(([topic, { words, action }]) => {
    const button = action && make("button", { type: "button", className: "plain", onclick: action.do }, action.name);
    return make("p", { className: topic }, words, " ", button ?? "");
  });
  $("notice").replaceChildren(...lines);
}

/** Said by screen readers when they are free: whole answers, not every token. */
function speak(words) {
  $("spoken").textContent = words;
}

// The log stays at its end, unless one has scrolled up to read.
const atEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;

function scrollDown() {
  $("log").scrollTop = $("log").scrollHeight;
}

function paint(answer) {
  const view = views.get(answer);
  if (!view) return; // another conversation is open
  const follow = atEnd();
  const here = running?.answer === answer;
  for (const other of view.turn.answers) views.get(other).update(here && other === answer ? waiting() : "after GLASS");
  if (follow) scrollDown();
  showLatest();
}

function showLatest() {
  $("latest").hidden = atEnd();
}

let painting = 0;
let pause = 30;

/** Paint soon: tokens may come faster than long answers can be drawn. */
function paintSoon(answer) {
  if (painting) return;
  painting = setTimeout(() => {
    const start = performance.now();
    paint(answer);
    pause = Math.max(30, 4 * (performance.now() - start));
    painting = 0;
  }, pause);
}

// ---- Asking

function send(text) {
  const said = text.trim();
  if (!said || running) return;
  chat.title ||= said.replace(/\s+/g, " ").slice(0, 80);
  const kinds = settings.mode === "both" ? ["glass", "dense"] : [settings.mode];
  const turn = { said, answers: kinds.map((kind) => store.answer(kind, kind === "dense" ? 100 : settings.density)) };
  chat.turns.push(turn);
  $("turns").append(addViews(turn));
  showWelcome();
  run(chat, turn, turn.answers);
  scrollDown();
}

function again(answer) {
  const turn = chat.turns.find((one) => one.answers.includes(answer));
  if (running || !turn) return;
  Object.assign(answer, store.answer(answer.kind, answer.density));
  run(chat, turn, [answer]);
  $("message").focus(); // the button that was pressed has gone
}

/** Have answers written, one after the other, in the conversation that is open now or no longer. */
async function run(asked, turn, answers) {
  const controller = new AbortController();
  lookSoon(300); // whether it waits for a model, say; most answers have begun by then
  for (const answer of answers) {
    running = { chat: asked, answer, controller, since: Date.now() };
    showRunning();
    keep(asked);
    paint(answer);
    await fill(asked, turn, answer, controller.signal);
    keep(asked);
  }
  const last = running;
  running = null;
  showRunning();
  clearTimeout(painting);
  painting = 0;
  for (const answer of answers) paint(answer);
  if (last.chat === chat) speak(answers.map((answer) => views.get(answer)?.spoken() ?? "").join("\n"));
  lookSoon(0);
}

async function fill(asked, turn, answer, signal) {
  const times = [];
  try {
    for await (const event of stream(request(asked, turn, answer), signal)) {
      const choice = event.choices?.[0];
      const { content, reasoning_content: reasoning } = choice?.delta ?? {};
      answer.text += content ?? "";
      answer.reasoning += reasoning ?? "";
      if (content || reasoning) timed(answer, times);
      if (event.usage) answer.figures = figures(event.usage);
      answer.finish = choice?.finish_reason ?? answer.finish;
      paintSoon(answer);
    }
    answer.finish ||= "stop";
  } catch (e) {
    answer.finish = "stopped";
    if (!signal.aborted) failed(answer, e);
  }
}

function failed(answer, e) {
  if (!(e instanceof Failure)) console.error(e);
  answer.finish = "failed";
  answer.error = e instanceof Failure ? e.message : "The page failed to show this answer.";
  if (e.kind === "key") askForKey(e.message);
  if (e.kind === "gone") lookSoon(0);
}

/** The speed so far, as it looks from here; the server's own figure comes at the end. */
function timed(answer, times) {
  times.push(performance.now());
  const seconds = (times.at(-1) - times[0]) / 1000;
  if (seconds > 0.2) answer.figures = { tps: (times.length - 1) / seconds, kept: 0, total: 0, tokens: times.length };
}

function figures({ completion_tokens: tokens, glass }) {
  return { tps: glass.generation_tps, kept: glass.kept_neurons, total: glass.total_neurons, tokens };
}

/** What the server is asked. Each of two columns goes on with its own answers, and as a client of its own: a dense
 * answer then never builds on what the sparse model left in a cache. */
function request(asked, turn, answer) {
  const messages = asked.system.trim() ? [{ role: "system", content: asked.system.trim() }] : [];
  for (const past of asked.turns.slice(0, asked.turns.indexOf(turn))) {
    const given = past.answers.filter((one) => one.text);
    const content = (given.find((one) => one.kind === answer.kind) ?? given[0])?.text;
    if (content) messages.push({ role: "user", content: past.said }, { role: "assistant", content });
  }
  messages.push({ role: "user", content: turn.said });
  const body = { messages, density: answer.density / 100, user: `page ${asked.id} ${answer.kind}` };
  if ($("model").value) body.model = $("model").value;
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.maxTokens !== "") body.max_tokens = Number(settings.maxTokens);
  return body;
}

function stop() {
  running?.controller.abort();
}

const removed = new WeakSet(); // an answer that was stopped by deleting its conversation must not bring it back

function keep(one) {
  if (removed.has(one)) return;
  one.changed = Date.now();
  const kept = store.save(one);
  notice("storage", kept ? "" : "The browser has no room to keep this conversation. Delete older ones to make some.");
}

// ---- Conversations

function openChat(one) {
  closeMenu();
  showChat(one);
  $("message").focus();
}

function newChat() {
  openChat(chat.turns.length ? store.create(settings.system) : chat);
}

function removeChat(one) {
  if (running?.chat === one) stop();
  const at = store.all().indexOf(one);
  removed.add(one);
  store.remove(one);
  if (one === chat) showChat(store.create(settings.system));
  else showList();
  const rest = $("chats").querySelectorAll(".open");
  (rest[Math.min(at, rest.length - 1)] ?? $("new")).focus();
  const undo = () => {
    notice("deleted", "");
    removed.delete(one);
    store.save(one);
    openChat(one);
  };
  notice("deleted", `“${one.title.slice(0, 40)}” was deleted.`, { name: "Undo", do: undo });
  clearTimeout(removeChat.timer);
  removeChat.timer = setTimeout(() => notice("deleted", ""), 15_000);
}

// ---- The server's state

const STATES = {
  ready: ({ model }) => `${model} is ready`,
  generating: ({ model, tokens_per_second: tps }) =>
    `${model} is answering${tps ? `, ${tps.toFixed(0)} tokens/s` : ""}`,
  loading: ({ model }) => `loading ${model}…`,
  unloaded: () => "ready, loads a model when asked",
  failed: ({ error }) => error,
};

function showState() {
  const absent = reachable ? "waiting for a key" : "not reachable";
  const words = status ? (STATES[status.state]?.(status) ?? status.state) : absent;
  const queue = status?.queued ? `, ${status.queued} waiting` : "";
  $("state-words").textContent = `${words}${queue}`;
  $("state").title = status?.error ?? "";
  $("lamp").className = status ? status.state : "failed";
}

/** Why an answer has not begun. */
function waiting() {
  const seconds = Math.round((Date.now() - running.since) / 1000);
  const after = seconds > 2 ? ` ${seconds} s` : "";
  if (running.answer.reasoning) return `Thinking…${after}`;
  if (status?.state === "loading") {
    const patience = seconds > 15 ? " A large model takes a minute or two." : "";
    return `Loading ${status.model}…${after}${patience}`;
  }
  return status?.queued ? `Waiting for its turn…${after}` : `Reading…${after}`;
}

async function look() {
  const before = status;
  try {
    status = await getStatus();
    if (!before) await connected();
  } catch (e) {
    status = null;
    reachable = e.kind !== "gone";
    if (e.kind === "key") askForKey(e.message);
    else notice("connection", `${e.message} This page looks again every few seconds.`);
  }
  showState();
  if (running && !running.answer.text) paint(running.answer);
}

async function connected() {
  reachable = true;
  notice("connection", "");
  $("key-form").hidden = true;
  await showModels();
}

let next = 0;

/** Look at the server's state soon, and from then on: often while something happens, never while nobody sees it. */
function lookSoon(delay) {
  clearTimeout(next);
  next = setTimeout(async () => {
    if (!document.hidden) await look();
    lookSoon(running || status?.state === "loading" || status?.state === "generating" ? 1000 : 4000);
  }, delay);
}

function askForKey(words) {
  status = null;
  reachable = true;
  notice("connection", words);
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

async function showModels() {
  const models = await getModels();
  const options = models.map((model) => {
    const size = model.size_bytes ? ` · ${bytes(model.size_bytes)}` : "";
    return new Option(`${model.id}${model.downloaded ? size : " · downloads first"}`, model.id);
  });
  $("model").replaceChildren(...options);
  const wanted = models.some((model) => model.id === settings.model) ? settings.model : models[0]?.id;
  $("model").value = wanted ?? "";
  showWelcome();
}

function bytes(count) {
  return count < 1e9 ? `${Math.round(count / 1e6)} MB` : `${(count / 1e9).toFixed(1)} GB`;
}

// ---- Controls

function showControls() {
  document.querySelector(`[name=mode][value=${settings.mode}]`).checked = true;
  $("density").value = settings.density;
  $("density-words").textContent = `${settings.density} %`;
  $("density").setAttribute("aria-valuetext", `${settings.density} % of the neurons`);
  $("density-group").disabled = settings.mode === "dense";
  for (const preset of document.querySelectorAll("[data-density]")) {
    preset.setAttribute("aria-pressed", String(Number(preset.dataset.density) === settings.density));
  }
}

function set(changes) {
  Object.assign(settings, changes);
  store.saveSettings(settings);
  showControls();
}

function openSettings() {
  $("system").value = chat.system;
  $("temperature").value = settings.temperature;
  $("max-tokens").value = settings.maxTokens;
  sure(false);
  $("settings").showModal();
}

function closeSettings() {
  const changed = chat.system !== $("system").value;
  chat.system = $("system").value;
  const valid = (input) => (input.validity.valid ? input.value : "");
  set({ system: chat.system, temperature: valid($("temperature")), maxTokens: valid($("max-tokens")) });
  if (changed && chat.turns.length) keep(chat);
  showChat(chat);
  $("message").focus();
}

/** Deleting everything takes two clicks. */
function sure(asked) {
  $("delete-all").textContent = asked ? "Yes, delete all of them" : "Delete all conversations";
  $("delete-all").dataset.asked = asked ? "yes" : "";
}

function deleteAll() {
  if (!$("delete-all").dataset.asked) {
    sure(true);
    return;
  }
  stop();
  if (running) removed.add(running.chat);
  store.removeAll();
  showChat(store.create($("system").value));
  $("settings").close();
}

function resize() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 240)}px`;
}

function submit() {
  if (running || !$("message").value.trim()) return;
  const text = $("message").value;
  $("message").value = "";
  resize();
  send(text);
}

async function copy(button) {
  const code = button.closest(".code")?.querySelector("code");
  const answer = [...views].find(([, view]) => view.copy === button)?.[0];
  const words = button.textContent;
  button.textContent = (await copied(code?.textContent ?? answer.text.trim())) ? "Copied" : "Not copied";
  speak(button.textContent);
  setTimeout(() => (button.textContent = words), 1500);
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedTheOldWay(text); // over plain http only localhost may use the clipboard
  }
}

function copiedTheOldWay(text) {
  const focused = document.activeElement;
  const box = make("textarea", { value: text, className: "hidden" });
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return done;
}

function openMenu() {
  document.body.classList.add("menu");
  $("shade").hidden = false;
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeMenu() {
  document.body.classList.remove("menu");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
}

function onKey(event) {
  const command = (event.ctrlKey || event.metaKey) && !event.altKey;
  const chord = command && event.code === (event.shiftKey ? "KeyO" : "KeyN");
  if ($("settings").open) return;
  if (chord) {
    event.preventDefault(); // most browsers keep Ctrl+N for themselves; windows of apps do not
    newChat();
  } else if (event.key === "Escape" && document.body.classList.contains("menu")) {
    closeMenu();
    $("menu").focus();
  } else if (event.key === "Escape" && running) {
    stop();
  }
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("message").addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // Safari says only the latter of a composition's end
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    submit();
  });
  $("message").addEventListener("input", resize);
  $("stop").addEventListener("click", () => {
    stop();
    $("message").focus();
  });
  $("new").addEventListener("click", newChat);
  $("menu").addEventListener("click", openMenu);
  $("shade").addEventListener("click", closeMenu);
  $("latest").addEventListener("click", scrollDown);
  $("log").addEventListener("scroll", showLatest);
  $("turns").addEventListener("click", (event) => {
    if (event.target.dataset.copy) copy(event.target);
  });
  $("model").addEventListener("change", () => {
    set({ model: $("model").value });
    showWelcome();
  });
  for (const radio of document.querySelectorAll("[name=mode]")) {
    radio.addEventListener("change", () => set({ mode: radio.value }));
  }
  $("density").addEventListener("input", () => set({ density: Number($("density").value) }));
  for (const preset of document.querySelectorAll("[data-density]")) {
    preset.addEventListener("click", () => set({ density: Number(preset.dataset.density) }));
  }
  $("settings-open").addEventListener("click", openSettings);
  $("settings").addEventListener("close", closeSettings);
  $("delete-all").addEventListener("click", deleteAll);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key").value = "";
    $("key-form").hidden = true;
    $("message").focus();
    lookSoon(0);
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", () => lookSoon(0));
  addEventListener("online", () => lookSoon(0));
  addEventListener("pagehide", () => running && keep(running.chat));
  addEventListener("storage", () => {
    store.load([chat, running?.chat].filter((one) => one?.turns.length)); // another tab has written
    showList();
  });
}

$("new-keys").textContent = APPLE ? "⇧⌘O" : "Ctrl+Shift+O";
for (const words of EXAMPLES) {
  $("examples").append(make("button", { type: "button", onclick: () => send(words) }, words));
}
wire();
showControls();
showChat(chat);
showState();
lookSoon(0);
$("message").focus();
