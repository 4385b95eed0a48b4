// Words for what the server and its answers are doing. Numbers and states go in, text comes out.

export function bytes(count) {
  return count < 1e9 ? `${Math.round(count / 1e6)} MB` : `${(count / 1e9).toFixed(1)} GB`;
}

export function percent(share) {
  return `${(100 * share).toLocaleString("en", { maximumFractionDigits: 0 })} %`;
}

export function number(value, digits = 0) {
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

/** "40 s", "2 min", "3 h": what is left is never said more exactly than it is known. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** "reading 40 % (2 min left)": how far a phase of a measurement is. */
export function measured({ phase, share, seconds_left: left, stopping }) {
  if (stopping) return "stopping";
  return phase ? `${phase} ${percent(share)}${left ? ` (${duration(left)} left)` : ""}` : "just begun";
}

/** The server's state in the page's head. `absent` models are downloaded when they are loaded; `chosen` is the model
 * that the next message goes to. */
export function stateWords(status, { reachable, chosen, absent }) {
  if (!status) return reachable ? "waiting for a key" : "not reachable";
  const { state, model, measuring, queued, tokens_per_second: tps, error, has_ranks: ranked } = status;
  const loads = `${chosen} loads with the next message`;
  const words = {
    unloaded: () => loads,
    loading: () => `${absent.has(model) ? "downloading" : "loading"} ${model}…`,
    ready: () => `${model} is ready${ranked ? "" : ", no ranks yet"}${chosen === model ? "" : `; ${loads}`}`,
    generating: () => `${model} is answering${tps ? `, ${number(tps)} tokens/s` : ""}`,
    measuring: () => `measuring ${model}, ${measured(measuring)}`,
    failed: () => error,
  }[state];
  const later = measuring && state !== "measuring";
  const rest = later ? `, measuring ${measuring.model} goes on when nobody waits: ${measured(measuring)}` : "";
  return `${words ? words() : state}${queued ? `, ${queued} waiting` : ""}${rest}`;
}

/** Why an answer has not begun after so many seconds. */
export function waitingWords(status, absent, isThinking, seconds) {
  const after = seconds > 2 ? ` ${seconds} s` : "";
  if (isThinking) return `Thinking…${after}`;
  if (status?.state === "loading") {
    if (absent.has(status.model)) return `Downloading ${status.model}, which takes as long as its size says…${after}`;
    return `Loading ${status.model}…${after}${seconds > 15 ? " A large model takes a minute or two." : ""}`;
  }
  const first = status?.place;
  if (first) return `${first === 1 ? "One answer comes" : `${first} answers come`} first…${after}`;
  if (status?.state === "measuring") return `${status.model} is being measured, and answers between two steps…${after}`;
  return `Reading…${after}`;
}

/** What missing ranks cost, and what measuring them does. */
export function withoutRanks(model) {
  return (
    `${model} has no global ranks yet: your message alone chooses the neurons, and answers stray further from the ` +
    "dense model's. Measuring them, once, takes minutes on a GPU and hours without one; answers go first."
  );
}

/** How often the sparse model's most likely token is the dense one's at a density, between the measured densities;
 * null where that is not known. */
export function agreementAt(density, points) {
  if (density === 1) return 1;
  if (!points?.length || density < points[0].density) return null;
  const known = [...points, { density: 1, agreement: 1 }];
  const above = known.findIndex((point) => point.density >= density);
  if (above === 0) return known[0].agreement;
  const [a, b] = known.slice(above - 1, above + 1);
  return a.agreement + ((density - a.density) / (b.density - a.density)) * (b.agreement - a.agreement);
}

export function nameOf({ kind, density, quality, verify }) {
  if (kind === "dense") return "Dense";
  const share = density ? ` ${density} %` : quality ? ` ${quality}` : "";
  return `GLASS${share}${verify ? ", verified" : ""}`;
}

const ENDINGS = {
  length: "cut at the length limit",
  stopped: "stopped",
  cancelled: "ended by the server",
  tool_calls: "asked for a tool",
};

/** "133.5 tokens/s", "demo", "50 % of neurons", ...: parts of the line below an answer, as [words, class]. */
export function figuresOf(answer, turn) {
  const { figures, finish, model } = answer;
  const parts = [];
  if (figures) {
    const { tps, kept, total, tokens, agreement, drafted } = figures;
    parts.push([`${total ? "" : "about "}${number(tps, 1)} tokens/s`, "speed"]); // no total: timed here
    const faster = speedUp(answer, turn);
    if (faster) parts.push([faster, "speedup"]);
    if (model) parts.push([model]);
    if (total) parts.push([kept === total ? "all neurons" : `${percent(kept / total)} of neurons`]);
    if (drafted !== null) parts.push([`the dense model's own words, ${percent(drafted / tokens)} of them drafted`]);
    else if (agreement !== null && kept < total) parts.push([`same top token about ${percent(agreement)}`]);
    parts.push([tokens === 1 ? "1 token" : `${number(tokens)} tokens`]);
  }
  if (finish === "stop" && !answer.text) parts.push(["an empty answer"]);
  if (ENDINGS[finish]) parts.push([ENDINGS[finish]]);
  return parts;
}

/** How the speeds of two answers compare, once both are known. */
function speedUp(answer, turn) {
  const dense = turn.answers.find((other) => other.kind === "dense" && other !== answer)?.figures;
  const both = turn.answers.length > 1 && turn.answers.every((other) => other.figures?.total && other.figures.tps > 0);
  if (!both) return "";
  return dense ? `${(answer.figures.tps / dense.tps).toFixed(2)}× dense` : "1× dense";
}
