// The chat page: what is shown, what one does with it, and the keyboard.

import { ask, jobOf, jobs, stop } from "./asking.js";
import * as chats from "./chats.js";
import { copied } from "./clipboard.js";
import { notice, passing } from "./notices.js";
import * as server from "./server.js";
import { plans, set, settings, wire as wireSettings } from "./settings.js";
import * as store from "./store.js";
import { button, make, turnView } from "./view.js";
import { number, percent } from "./words.js";

const $ = (id) => document.getElementById(id);
const APPLE = /Mac|iPhone|iPad/.test(navigator.platform);
const EXAMPLES = [
  "I want to find a restaurant in San Jose.",
  "What is the weather like today?",
  "I need a hotel in London.",
];

store.load();
let chat = store.current() ?? store.create(settings.system);
let views = new Map(); // of the answers that are shown

// ---- What is shown

function showChat(chosen) {
  chat = chosen;
  store.setCurrent(chat);
  views = new Map();
  $("turns").replaceChildren(...chat.turns.map(addViews));
  const system = chat.system.trim();
  if (system) $("turns").prepend(make("p", { className: "system" }, `System prompt: ${system}`));
  showWelcome();
  showRunning();
  showContext(chat.turns.at(-1)?.answers[0]);
  scrollDown();
  if (jobOf(chat)) paint(jobOf(chat).answer);
}

function addViews(turn) {
  const view = turnView(turn, { edit, again, goOn });
  turn.answers.forEach((answer, i) => views.set(answer, view.views[i]));
  return view.element;
}

function showWelcome() {
  $("welcome").hidden = chat.turns.length > 0;
  $("examples").hidden = $("model").value !== "demo"; // it knows little else
}

function showList() {
  chats.showList(chat, (one) => jobs.has(one.id), { open: openChat, remove: removeChat, keep: renamed });
}

function showRunning() {
  const answering = jobOf(chat) !== undefined;
  $("send").hidden = answering;
  $("stop").hidden = !answering;
  $("log").setAttribute("aria-busy", String(answering));
  showList();
}

/** How much of the model's context a conversation takes, once that is known. */
function showContext(answer) {
  const used = answer?.figures?.context;
  const most = server.server.status?.facts?.context_tokens;
  const of = most ? ` of ${number(most)} tokens (${percent(used / most)})` : " tokens";
  $("context").textContent = used ? `Context: ${number(used)}${of}` : "";
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
  const job = jobOf(chat);
  for (const other of view.turn.answers) views.get(other).update(job?.answer === other ? server.waiting(job) : "after GLASS");
  showContext(answer);
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
  if (!said || jobOf(chat)) return;
  chat.title ||= said.replace(/\s+/g, " ").slice(0, 80);
  const turn = { said, answers: plans().map(store.answer) };
  chat.turns.push(turn);
  $("turns").append(addViews(turn));
  showWelcome();
  run({ chat, turn, answers: turn.answers });
  scrollDown();
}

/** Say something else instead: what came after it goes, and can be brought back. */
function edit(turn, said) {
  if (jobOf(chat)) return;
  const [edited, at] = [chat, chat.turns.indexOf(turn)];
  const gone = chat.turns.splice(at);
  showChat(chat);
  send(said);
  $("message").focus();
  const undo = () => {
    notice("edited", "");
    stop(edited);
    edited.turns.splice(at, Infinity, ...gone);
    keep(edited);
    openChat(edited);
  };
  passing("edited", "The message and what came after it were replaced.", { name: "Undo", do: undo });
}

/** Answer again, in the way that is chosen now; each of two columns stays what it is. */
function again(answer) {
  const turn = turnOf(answer);
  if (jobOf(chat) || !turn) return;
  const [plan] = plans();
  const kind = turn.answers.length > 1 ? answer.kind : plan.kind;
  Object.assign(answer, store.answer({ ...plan, kind }));
  run({ chat, turn, answers: [answer] });
  $("message").focus(); // the button that was pressed has gone
}

/** Go on with an answer that was cut. */
function goOn(answer) {
  const turn = turnOf(answer);
  if (jobOf(chat) || !turn) return;
  run({ chat, turn, answers: [answer], goesOn: true });
  $("message").focus();
}

function turnOf(answer) {
  return chat.turns.find((one) => one.answers.includes(answer));
}

/** Have answers written, in the conversation that is open now or no longer. */
function run(work) {
  server.lookSoon(300); // whether it waits for a model, say; most answers have begun by then
  ask(work, { model: $("model").value, sampling: settings.sampling }, { kept: keep, begun, written: paintSoon, ended });

  function begun(answer) {
    showRunning();
    paint(answer);
  }

  function ended(answers) {
    showRunning();
    clearTimeout(painting);
    painting = 0;
    for (const answer of answers) paint(answer);
    const failure = answers.find((answer) => answer.error);
    if (failure?.failure === "key") server.askForKey(failure.error);
    if (work.chat === chat) speak(answers.map((answer) => views.get(answer)?.spoken() ?? "").join("\n"));
    server.lookSoon(0);
  }
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
  server.lookSoon(0); // its place in the queue
  $("message").focus();
}

function newChat() {
  openChat(chat.turns.length ? store.create(settings.system) : chat);
}

function renamed(one, really) {
  if (really) keep(one);
  showList();
}

function removeChat(one) {
  stop(one);
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
  passing("deleted", `“${one.title.slice(0, 40)}” was deleted.`, { name: "Undo", do: undo });
}

function removeAll() {
  for (const { chat: one, controller } of jobs.values()) {
    removed.add(one);
    controller.abort();
  }
  store.removeAll();
  showChat(store.create($("system").value));
}

async function importFile() {
  const [file] = $("import-file").files;
  if (!file) return;
  passing("imported", await chats.importChats(file));
  $("import-file").value = "";
  showChat(store.all().find((one) => one.id === chat.id) ?? chat);
}

// ---- The keyboard and the mouse

function resize() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 240)}px`;
}

function submit() {
  if (jobOf(chat) || !$("message").value.trim()) return;
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
  } else if (event.key === "Escape" && event.target !== $("search")) {
    stop(chat); // what is seen; another conversation's answer goes on
  }
}

function wireMessage() {
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
    stop(chat);
    $("message").focus();
  });
}

function wire() {
  wireMessage();
  $("new").addEventListener("click", newChat);
  $("search").addEventListener("input", showList);
  $("export").addEventListener("click", chats.exportChats);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importFile);
  $("menu").addEventListener("click", openMenu);
  $("shade").addEventListener("click", closeMenu);
  $("latest").addEventListener("click", scrollDown);
  $("log").addEventListener("scroll", showLatest);
  $("turns").addEventListener("click", (event) => {
    if (event.target.dataset.copy) copy(event.target);
  });
  $("model").addEventListener("change", () => {
    set({ model: $("model").value });
    server.showState();
    showWelcome();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", () => [...jobs.values()].forEach((job) => keep(job.chat)));
  addEventListener("storage", () => {
    const here = [chat, ...[...jobs.values()].map((job) => job.chat)];
    store.load(here.filter((one) => one.turns.length)); // another tab has written
    showList();
  });
  wireSettings({
    current: () => chat,
    removeAll,
    closed(changed) {
      if (changed && chat.turns.length) keep(chat);
      showChat(chat);
      $("message").focus();
    },
  });
  server.wire({ chat: () => chat, paint, showWelcome });
}

$("new-keys").textContent = APPLE ? "⇧⌘O" : "Ctrl+Shift+O";
for (const words of EXAMPLES) $("examples").append(button("", words, () => send(words)));
wire();
showChat(chat);
$("message").focus();
