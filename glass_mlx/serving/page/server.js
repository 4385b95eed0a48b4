// The server's state, looked at again and again, and what the page says about it.

import { getModels, getStatus, measure, setKey, stopMeasuring } from "./api.js";
import { jobOf, userOf } from "./asking.js";
import { notice } from "./notices.js";
import { know, settings } from "./settings.js";
import { bytes, stateWords, waitingWords, withoutRanks } from "./words.js";

const $ = (id) => document.getElementById(id);

export const server = { status: null, reachable: true, absent: new Set() };
const later = new Set(); // models whose ranks are not to be spoken of any more
let page; // {chat(), paint(answer), showWelcome()}
let next = 0;

/** Why the answer of a job has not begun. */
export function waiting({ answer, since }) {
  const seconds = Math.round((Date.now() - since) / 1000);
  return waitingWords(server.status, server.absent, answer.reasoning !== "", seconds);
}

export function showState() {
  const { status, reachable, absent } = server;
  know(status?.model === $("model").value ? status.facts : null);
  $("state-words").textContent = stateWords(status, { reachable, absent, chosen: $("model").value || "a model" });
  $("state").title = $("state-words").textContent;
  $("lamp").className = status ? status.state : "failed";
  $("stop-measuring").hidden = !status?.measuring || status.measuring.stopping;
  const known = status?.model && status.facts && !status.has_ranks && !status.measuring && !later.has(status.model);
  if (!known) return notice("ranks", "");
  const now = { name: "Measure now", do: () => change(measure(status.model)) };
  const never = { name: "Not now", do: () => (later.add(status.model), showState()) };
  notice("ranks", withoutRanks(status.model), now, never);
}

async function change(asked) {
  try {
    server.status = await asked;
  } catch (e) {
    notice("connection", e.message);
  }
  showState();
  lookSoon(500);
}

async function look() {
  const before = server.status;
  const job = jobOf(page.chat());
  try {
    server.status = await getStatus(job ? userOf(job.chat, job.answer) : "");
    if (!before) await connected();
    if (server.status.facts) server.absent.delete(server.status.model); // it has been downloaded
  } catch (e) {
    server.status = null;
    server.reachable = e.kind !== "gone";
    if (e.kind === "key") askForKey(e.message);
    else notice("connection", `${e.message} This page looks again every few seconds.`);
  }
  showState();
  if (job && !job.answer.text) page.paint(job.answer);
}

async function connected() {
  server.reachable = true;
  notice("connection", "");
  $("key-form").hidden = true;
  await showModels();
}

/** Look at the server's state soon, and from then on: often while something happens, never while nobody sees it. */
export function lookSoon(delay) {
  clearTimeout(next);
  next = setTimeout(async () => {
    if (!document.hidden) await look();
    const busy = jobOf(page.chat()) || ["loading", "generating", "measuring"].includes(server.status?.state);
    lookSoon(busy ? 1000 : 4000);
  }, delay);
}

export function askForKey(words) {
  server.status = null;
  server.reachable = true;
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
  server.absent = new Set(models.filter((model) => !model.downloaded).map((model) => model.id));
  page.showWelcome();
}

export function wire(hooks) {
  page = hooks;
  $("stop-measuring").addEventListener("click", () => change(stopMeasuring()));
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key").value = "";
    $("key-form").hidden = true;
    $("message").focus();
    lookSoon(0);
  });
  document.addEventListener("visibilitychange", () => lookSoon(0));
  addEventListener("online", () => lookSoon(0));
  showState();
  lookSoon(0);
}
