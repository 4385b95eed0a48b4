// Messages about the page itself, one for each topic, until they are over.

import { button, make } from "./view.js";

const notices = new Map();

/** Show words on a topic with what can be done about it: {name, do} each; "" ends them. */
export function notice(topic, words, ...actions) {
  const before = notices.get(topic)?.words;
  if (words) notices.set(topic, { words, actions });
  else notices.delete(topic);
  if (before === (words || undefined)) return; // or screen readers would say it again
  const lines = [...notices].map(([topic, { words, actions }]) => {
    const buttons = actions.map(({ name }, i) => button("plain", name, () => notices.get(topic).actions[i].do()));
    return make("p", { className: topic }, words, " ", ...buttons);
  });
  document.getElementById("notice").replaceChildren(...lines);
}

const passed = new Map();

/** Show a notice for a while. */
export function passing(topic, words, ...actions) {
  notice(topic, words, ...actions);
  clearTimeout(passed.get(topic));
  passed.set(topic, setTimeout(() => notice(topic, ""), 15_000));
}
