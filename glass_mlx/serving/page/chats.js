// The list of conversations: search, rename, delete, and files of them.

import * as store from "./store.js";
import { button, make } from "./view.js";

const $ = (id) => document.getElementById(id);

/** Show the conversations that the search finds. `act` has what can be done: open, remove, keep. */
export function showList(current, isBusy, act) {
  if ($("chats").querySelector("input")) return; // one is being renamed
  const found = store.all().filter(matches($("search").value));
  const items = found.map((chat) => item(chat, chat === current, isBusy(chat), act));
  $("chats").replaceChildren(...items);
  $("none").hidden = found.length > 0 || !$("search").value;
}

function item(chat, isCurrent, busy, act) {
  const title = chat.title || "New chat";
  const open = button("open", title, () => act.open(chat));
  if (isCurrent) open.setAttribute("aria-current", "true");
  if (busy) open.append(make("span", { className: "hidden" }, " (answering)"));
  open.classList.toggle("busy", busy);
  const line = make("li", {}, open);
  line.append(
    button("icon rename", "✎", () => rename(chat, line, act), `Rename ${title}`),
    button("icon delete", "×", () => act.remove(chat), `Delete ${title}`),
  );
  return line;
}

function rename(chat, line, act) {
  const field = make("input", { value: chat.title, maxLength: 80 });
  field.setAttribute("aria-label", `New name of ${chat.title || "New chat"}`);
  const done = (save) => {
    if (!field.isConnected) return;
    const title = field.value.trim();
    field.onblur = null;
    line.replaceChildren(); // the list may be shown again
    if (save && title) chat.title = title;
    act.keep(chat, save && title);
    [...$("chats").querySelectorAll(".open")].find((one) => one.textContent.startsWith(chat.title))?.focus();
  };
  field.onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.stopPropagation();
    done(event.key === "Enter");
  };
  field.onblur = () => done(true);
  line.replaceChildren(field);
  field.select();
}

/** Whether a conversation has all the words somewhere. */
function matches(search) {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  return (chat) => {
    if (!words.length) return true;
    const parts = chat.turns.flatMap((turn) => [turn.said, ...turn.answers.map((answer) => answer.text)]);
    const text = [chat.title, ...parts].join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  };
}

/** Save all conversations as a file. */
export function exportChats() {
  const file = new Blob([JSON.stringify(store.exported(), null, 1)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: "glass-conversations.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Add the conversations of a file; says what came of it. */
export async function importChats(file) {
  let added = null;
  try {
    added = store.imported(JSON.parse(await file.text()));
  } catch {
    // it is not JSON
  }
  if (added === null) return `“${file.name}” holds no conversations that this page has exported.`;
  return added === 1 ? "One conversation was imported." : `${added} conversations were imported.`;
}
