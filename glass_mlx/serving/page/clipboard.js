// Copying, also where the browser does not let pages do it directly.

import { make } from "./view.js";

/** Copy a text; returns whether it could be done. */
export async function copied(text) {
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
