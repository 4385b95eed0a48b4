// Turns and answers as elements. An answer's view shows what the answer is when `update` is called.

import { render } from "./markdown.js";

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const { data, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** A turn: what was said and the views of its answers. */
export function turnView(turn, again) {
  const views = turn.answers.map((answer) => new AnswerView(answer, turn, again));
  const said = make("div", { className: "said" }, make("h2", { className: "hidden" }, "You"), make("p", {}, turn.said));
  const answers = make("div", { className: turn.answers.length > 1 ? "answers two" : "answers" });
  answers.append(...views.map((view) => view.element));
  return { element: make("article", { className: "turn" }, said, answers), views };
}

export class AnswerView {
  constructor(answer, turn, again) {
    this.answer = answer;
    this.turn = turn;
    const name = nameOf(answer);
    this.title = make("h3", { className: turn.answers.length > 1 ? "kind" : "hidden" }, name);
    this.thoughts = make("div", { className: "markdown" });
    this.thinking = make("details", { className: "thinking" }, make("summary", {}, "Thinking"), this.thoughts);
    this.text = make("div", { className: "markdown" });
    this.wait = make("p", { className: "wait" });
    this.error = make("p", { className: "error" });
    this.again = make("button", { type: "button", className: "plain", onclick: () => again(answer) }, "Try again");
    this.bar = make("div", { className: "bar" }, make("div"));
    this.bar.setAttribute("aria-hidden", "true");
    this.figures = make("span", { className: "figures" });
    this.copy = make("button", { type: "button", className: "quiet", data: { copy: "answer" } }, "Copy");
    this.copy.setAttribute("aria-label", "Copy answer");
    const foot = make("footer", {}, this.figures, this.again, this.copy);
    this.element = make("div", { className: "answer", role: "group" });
    this.element.append(this.title, this.thinking, this.text, this.wait, this.error, this.bar, foot);
    this.element.setAttribute("aria-label", `Answer, ${name}`);
    this.update();
  }

  /** Show the answer as it is now; `waiting` says for what, before its first word. */
  update(waiting = "") {
    const { answer, turn } = this;
    const ended = answer.finish !== "";
    show(this.thinking, answer.reasoning);
    if (answer.reasoning) render(this.thoughts, answer.reasoning);
    render(this.text, answer.text);
    show(this.wait, !ended && !answer.text, waiting);
    show(this.error, answer.error, answer.error);
    show(this.again, ended && (answer.error || !answer.text));
    show(this.copy, ended && answer.text);
    this.figures.replaceChildren(...figuresOf(answer, turn));
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

function nameOf(answer) {
  return answer.kind === "dense" ? "Dense" : `GLASS ${answer.density} %`;
}

const ENDINGS = {
  length: "cut at the length limit",
  stopped: "stopped",
  cancelled: "ended by the server",
  tool_calls: "asked for a tool",
};

/** "133.5 tokens/s", "50 % of neurons", ... with dots between; lines break after these only. */
function figuresOf(answer, turn) {
  const words = [];
  const { figures, finish } = answer;
  if (figures) {
    const { tps, kept, total, tokens } = figures;
    const speed = tps.toLocaleString("en", { maximumFractionDigits: 1 });
    words.push(make("b", {}, `${total ? "" : "about "}${speed} tokens/s`)); // no total: timed here, not by the server
    const faster = speedUp(answer, turn);
    if (faster) words.push(make("span", { className: "speedup" }, faster));
    if (total) words.push(kept === total ? "all neurons" : `${percent(kept / total)} of neurons`);
    words.push(tokens === 1 ? "1 token" : `${tokens.toLocaleString("en")} tokens`);
  }
  if (finish === "stop" && !answer.text) words.push("an empty answer");
  if (ENDINGS[finish]) words.push(ENDINGS[finish]);
  return words.flatMap((word, i) => {
    const last = i === words.length - 1;
    return [make("span", { className: "whole" }, word, last ? "" : " ·"), last ? "" : " "];
  });
}

function percent(share) {
  return `${(100 * share).toLocaleString("en", { maximumFractionDigits: 0 })} %`;
}

/** How the speeds of two answers compare, once both are known. */
function speedUp(answer, turn) {
  const dense = turn.answers.find((other) => other.kind === "dense" && other !== answer)?.figures;
  const both = turn.answers.length > 1 && turn.answers.every((other) => other.figures?.total && other.figures.tps > 0);
  if (!both) return "";
  return dense ? `${(answer.figures.tps / dense.tps).toFixed(2)}× dense` : "1× dense";
}
