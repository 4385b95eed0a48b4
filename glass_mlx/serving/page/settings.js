// How to answer: the controls below the message, and the dialog.

import * as store from "./store.js";
import { agreementAt, percent } from "./words.js";

const $ = (id) => document.getElementById(id);
const DENSITY = 50; // in percent, while the server's own is not known

export const settings = store.settings();

/** What is known of the model that answers: the server's `facts`; null until it is loaded. */
let facts = null;

export function know(found) {
  facts = found ?? null;
  showControls();
}

/** How the next answers are made, one for each column. */
export function plans() {
  const kinds = settings.mode === "both" ? ["glass", "dense"] : [settings.mode];
  return kinds.map((kind) => ({ kind, density: settings.density, quality: quality(), verify: settings.verify }));
}

/** The chosen quality, unless the model's densities are known not to have been measured. */
function quality() {
  return facts && !facts.qualities ? "" : settings.quality;
}

export function set(changes) {
  Object.assign(settings, changes);
  store.saveSettings(settings);
  showControls();
}

/** The density that answers will have, in percent, as far as it is known. */
function shownDensity() {
  if (quality()) return Math.round(100 * (facts?.qualities[quality()] ?? 0)) || null;
  return settings.density || Math.round(100 * (facts?.density ?? 0)) || DENSITY;
}

/** How close to the dense model the answers will be. */
function closeness(agreement) {
  if (settings.mode === "dense") return "";
  if (settings.verify) return "the dense model's answer";
  return agreement ? `same top token about ${percent(agreement)}` : "";
}

export function showControls() {
  document.querySelector(`[name=mode][value=${settings.mode}]`).checked = true;
  const density = shownDensity();
  const agreement = density && agreementAt(density / 100, facts?.densities);
  const words = density ? `${density} %` : "as needed";
  $("density").value = density ?? DENSITY;
  $("density-words").textContent = words;
  $("density").setAttribute("aria-valuetext", density ? `${words} of the neurons` : words);
  $("agreement").textContent = closeness(agreement);
  $("density-group").disabled = settings.mode === "dense";
  $("verify").checked = settings.verify;
  const unknown = facts !== null && !facts.qualities; // while no model is loaded, any may be chosen
  for (const choice of document.querySelectorAll("[data-quality]")) {
    const name = choice.dataset.quality;
    choice.setAttribute("aria-pressed", String(name === quality()));
    choice.disabled = unknown;
    const own = facts?.qualities?.[name];
    const cost = { high: 8, balanced: 4, fast: 3 }[name];
    const found = own ? `, with ${percent(own)} of the neurons here` : "";
    choice.title = unknown ? "Not measured for this model" : `Costs about what ${cost} bits a weight would${found}`;
  }
}

function open(chat) {
  $("system").value = chat.system;
  for (const field of document.querySelectorAll("[data-field]")) field.value = settings.sampling[field.dataset.field] ?? "";
  sure(false);
  $("settings").showModal();
}

/** Take over what is in the dialog; returns whether the conversation's system prompt is another one now. */
function close(chat) {
  const changed = chat.system !== $("system").value;
  chat.system = $("system").value;
  const fields = [...document.querySelectorAll("[data-field]")].filter((field) => field.value && field.validity.valid);
  set({ system: chat.system, sampling: Object.fromEntries(fields.map((field) => [field.dataset.field, Number(field.value)])) });
  return changed;
}

/** Deleting everything takes two clicks. */
function sure(asked) {
  $("delete-all").textContent = asked ? "Yes, delete all of them" : "Delete all conversations";
  $("delete-all").dataset.asked = asked ? "yes" : "";
}

/** `act` has what the dialog does to conversations: current(), closed(changed), removeAll(). */
export function wire(act) {
  for (const radio of document.querySelectorAll("[name=mode]")) {
    radio.addEventListener("change", () => set({ mode: radio.value }));
  }
  $("density").addEventListener("input", () => set({ density: Number($("density").value), quality: "" }));
  for (const choice of document.querySelectorAll("[data-quality]")) {
    const name = choice.dataset.quality;
    choice.addEventListener("click", () => set({ quality: settings.quality === name ? "" : name }));
  }
  $("verify").addEventListener("change", () => set({ verify: $("verify").checked }));
  $("settings-open").addEventListener("click", () => open(act.current()));
  $("settings").addEventListener("close", () => act.closed(close(act.current())));
  $("delete-all").addEventListener("click", () => {
    if (!$("delete-all").dataset.asked) return sure(true);
    act.removeAll();
    $("settings").close();
  });
  showControls();
}
