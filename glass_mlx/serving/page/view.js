// Turns and answers as elements. An answer's view shows what the answer is when `update` is called.

import { render } from "./markdown.js";
import { figuresOf, nameOf } from "./words.js";

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const { data, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** A button with words, or with a sign and words for screen readers. */
export function button(className, words, onclick, label = "") {
  const made = make("button", { type: "button", className, onclick }, words);
  if (label) {
    made.setAttribute("aria-label", label);
    made.title = label;
  }
  return made;
}

/** A turn: what was said and the views of its answers. `act` has what can be done: edit, again, goOn. */
export function turnView(turn, act) {
  const views = turn.answers.map((answer) => new AnswerView(answer, turn, act));
  const said = make("div", { className: "said" }, make("h2", { className: "hidden" }, "You"), make("p", {}, turn.said));
  said.append(button("quiet edit", "Edit", () => editSaid(said, turn, act), "Edit this message"));
  const answers = make("div", { className: turn.answers.length > 1 ? "answers two" : "answers" });
  answers.append(...views.map((view) => view.element));
  return { element: make("article", { className: "turn" }, said, answers), views };
}

/** Turn what was said into a field, until it is sent again or given up. */
function editSaid(said, turn, act) {
  const before = [...said.childNodes];
  const field = make("textarea", { value: turn.said, rows: Math.min(12, turn.said.split("\n").length + 1) });
  field.setAttribute("aria-label", "Edit your message");
  const close = () => {
    said.classList.remove("edited");
    said.replaceChildren(...before);
    before.at(-1).focus();
  };
  const send = () => field.value.trim() && act.edit(turn, field.value.trim());
  field.onkeydown = (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const buttons = make("p", { className: "buttons" }, button("quiet", "Cancel", close), button("accent", "Ask again", send));
  said.classList.add("edited");
  said.replaceChildren(before[0], field, buttons); // the heading stays
  field.focus();
}

export class AnswerView {
  constructor(answer, turn, act) {
    this.answer = answer;
    this.turn = turn;
    this.title = make("h3", { className: turn.answers.length > 1 ? "kind" : "hidden" });
    this.thoughts = make("div", { className: "markdown" });
    this.thinking = make("details", { className: "thinking" }, make("summary", {}, "Thinking"), this.thoughts);
    this.text = make("div", { className: "markdown" });
    this.wait = make("p", { className: "wait" });
    this.error = make("p", { className: "error" });
    this.again = button("quiet again", "Again", () => act.again(answer), "Answer again");
    this.goOn = button("quiet go-on", "Continue", () => act.goOn(answer), "Continue this answer");
    this.bar = make("div", { className: "bar" }, make("div"));
    this.bar.setAttribute("aria-hidden", "true");
    this.figures = make("span", { className: "figures" });
    this.copy = button("quiet", "Copy", null, "Copy answer");
    this.copy.dataset.copy = "answer";
    const foot = make("footer", {}, this.figures, this.goOn, this.again, this.copy);
    this.element = make("div", { className: "answer", role: "group" });
    this.element.append(this.title, this.thinking, this.text, this.wait, this.error, this.bar, foot);
    this.update();
  }

  /** Show the answer as it is now; `waiting` says for what, before its first word. */
  update(waiting = "") {
    const { answer, turn } = this;
    const ended = answer.finish !== "";
    show(this.title, true, nameOf(answer));
    this.element.setAttribute("aria-label", `Answer, ${nameOf(answer)}`);
    show(this.thinking, answer.reasoning);
    if (answer.reasoning) render(this.thoughts, answer.reasoning);
    render(this.text, answer.text);
    show(this.wait, !ended && !answer.text, waiting);
    show(this.error, answer.error, answer.error);
    show(this.again, ended);
    show(this.goOn, answer.text && ["length", "stopped", "failed"].includes(answer.finish));
    show(this.copy, ended && answer.text);
    this.figures.replaceChildren(...dotted(figuresOf(answer, turn)));
    const fastest = Math.max(...turn.answers.map((other) => other.figures?.tps ?? 0));
    show(this.bar, turn.answers.length > 1 && answer.figures && ended);
    this.bar.firstChild.style.width = `${(100 * (answer.figures?.tps ?? 0)) / (fastest || 1)}%`;
    this.element.classList.toggle("writing", !ended && answer.text !== "");
  }

  /** The answer as a screen reader should say it. */
  spoken() {
    const { answer } = this;
    if (answer.error) return answer.error;
    const copy = this.text.cloneNode(true);
    for (const button of copy.querySelectorAll("button")) button.remove();
    return `${nameOf(answer)}: ${copy.textContent.trim() || "an empty answer"}`;
  }
}

function show(element, condition, words) {
  element.hidden = !condition;
  if (words !== undefined && element.textContent !== words) element.textContent = words;
}

/** Parts with dots between; lines break after these only. */
function dotted(parts) {
  return parts.flatMap(([words, className = ""], i) => {
    const last = i === parts.length - 1;
    const part = make(className === "speed" ? "b" : "span", { className }, words);
    return [make("span", { className: "whole" }, part, last ? "" : " ·"), last ? "" : " "];
  });
}
