// Having answers written: what is asked of the server, and what comes of it. Every conversation may have one job at a
// time; the server answers them in turn.

import { Failure, chat as stream } from "./api.js";

/** The jobs, by conversation: {answer, controller, since}. */
export const jobs = new Map();

/** The job of a conversation; of one that was read from the storage again, too. */
export function jobOf(chat) {
  return jobs.get(chat.id);
}

/** The client that a job is to the server. Each of two columns is one of its own: a dense answer then never builds on
 * what the sparse model left in a cache. */
export function userOf(chat, answer) {
  return `page ${chat.id} ${answer.kind}`;
}

/** Have answers written, one after the other.
 * @param work {chat, turn, answers, goesOn}: where, which, and whether they go on with what they have
 * @param how {model, sampling}: the model to ask, "" for the server's, and the request's further fields
 * @param told {kept(chat), begun(answer), written(answer), ended(answers)}: called as it goes */
export async function ask({ chat, turn, answers, goesOn = false }, how, told) {
  const controller = new AbortController();
  for (const answer of answers) {
    jobs.set(chat.id, { chat, answer, controller, since: Date.now() });
    const body = request(chat, turn, answer, goesOn, how);
    answer.finish = answer.error = ""; // an answer that goes on had ended
    told.kept(chat);
    told.begun(answer);
    await fill(body, answer, controller.signal, () => told.written(answer));
    told.kept(chat);
  }
  jobs.delete(chat.id);
  told.ended(answers);
}

export function stop(chat) {
  jobOf(chat)?.controller.abort();
}

async function fill(body, answer, signal, written) {
  const times = [];
  const before = answer.figures; // of the part that an answer goes on from
  try {
    for await (const event of stream(body, signal)) {
      const choice = event.choices?.[0];
      const { content, reasoning_content: reasoning } = choice?.delta ?? {};
      answer.text += content ?? "";
      answer.reasoning += reasoning ?? "";
      answer.model = event.model ?? answer.model;
      if (content || reasoning) timed(answer, times, before);
      if (event.usage) answer.figures = figures(event.usage, answer, before);
      answer.finish = choice?.finish_reason ?? answer.finish;
      written();
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
  answer.failure = e.kind;
}

const FIGURES = { kept: 0, total: 0, agreement: null, drafted: null, context: null };

/** The speed so far, as it looks from here; the server's own figure comes at the end. */
function timed(answer, times, before) {
  times.push(performance.now());
  const seconds = (times.at(-1) - times[0]) / 1000;
  if (seconds < 0.2) return;
  answer.figures = { ...FIGURES, tps: (times.length - 1) / seconds, tokens: times.length + (before?.tokens ?? 0) };
}

/** What the server says of an answer. One that went on has the tokens of both parts. */
function figures({ prompt_tokens: prompt, completion_tokens: tokens, glass }, answer, before) {
  if (answer.kind === "glass") answer.density = Math.round(100 * glass.density);
  const drafted = glass.verified ? glass.drafted_tokens : null;
  return {
    tps: glass.generation_tps,
    kept: glass.kept_neurons,
    total: glass.total_neurons,
    tokens: tokens + (before?.tokens ?? 0),
    agreement: glass.expected_agreement ?? null,
    drafted: drafted === null ? null : drafted + (before?.drafted ?? 0),
    context: prompt + tokens,
  };
}

function request(chat, turn, answer, goesOn, { model, sampling }) {
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system.trim() }] : [];
  for (const past of chat.turns.slice(0, chat.turns.indexOf(turn))) {
    const given = past.answers.filter((one) => one.text);
    const content = (given.find((one) => one.kind === answer.kind) ?? given[0])?.text; // each column has its own
    if (content) messages.push({ role: "user", content: past.said }, { role: "assistant", content });
  }
  messages.push({ role: "user", content: turn.said });
  const body = { messages, user: userOf(chat, answer), ...sampling };
  if (goesOn) {
    messages.push({ role: "assistant", content: answer.text });
    Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  }
  if (answer.quality) body.quality = answer.quality;
  else if (answer.density) body.density = answer.density / 100;
  if (answer.kind === "glass" && answer.verify) body.verify = true;
  if (answer.kind === "dense") body.verify = false;
  if (model) body.model = model;
  return body;
}
