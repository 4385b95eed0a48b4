// Formulas in Markdown: $…$ and \(…\) within a line, $$…$$ and \[…\] on lines of their own, as MathML.

const { temml } = window; // which its file leaves there

// [opening, closing, whether it stands by itself], the longer ones first.
const MARKS = [
  ["$$", "$$", true],
  ["\\[", "\\]", true],
  ["\\(", "\\)", false],
  ["$", "$", false],
];
const LIMITS = { maxExpand: 500, maxSize: [20, 500] };

/** Teach a markdown-it to read formulas. */
export function formulas(markdown) {
  markdown.inline.ruler.before("escape", "formula", inline);
  markdown.block.ruler.before("fence", "formula", block, { alt: ["paragraph", "reference", "blockquote", "list"] });
  markdown.renderer.rules.formula = (tokens, i) => rendered(tokens[i]);
}

function inline(state, silent) {
  const { src, pos, posMax } = state;
  const mark = MARKS.find(([opening]) => src.startsWith(opening, pos));
  if (!mark) return false;
  const [opening, closing] = mark;
  const start = pos + opening.length;
  const end = src.indexOf(closing, start);
  if (end < 0 || end + closing.length > posMax || !isFormula(src, start, end, opening)) return false;
  if (!silent) push(state, src.slice(start, end), mark);
  state.pos = end + closing.length;
  return true;
}

/** "$5 and $6" are prices: within single dollars a formula neither begins nor ends with a space, and no digit follows. */
function isFormula(src, start, end, opening) {
  if (!src.slice(start, end).trim()) return false;
  return opening !== "$" || !(/\s/.test(src[start]) || /\s/.test(src[end - 1]) || /\d/.test(src[end + 1] ?? ""));
}

function block(state, startLine, endLine, silent) {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  const mark = MARKS.find(([opening, , alone]) => alone && state.src.startsWith(opening, start));
  if (!mark || state.sCount[startLine] - state.blkIndent >= 4) return false;
  const [opening, closing] = mark;
  for (let line = startLine; line < endLine; line++) {
    const from = line === startLine ? start + opening.length : state.bMarks[line];
    const text = state.src.slice(from, state.eMarks[line]).trimEnd();
    if (!text.endsWith(closing)) continue;
    if (silent) return true;
    const lines = state.getLines(startLine, line + 1, state.blkIndent, false).trim();
    push(state, lines.slice(opening.length, -closing.length), mark);
    state.line = line + 1;
    return true;
  }
  return false;
}

function push(state, text, [opening, closing, alone]) {
  const token = state.push("formula", "math", 0);
  Object.assign(token, { content: text, info: `${opening}${text}${closing}`, block: alone });
}

/** What cannot be read as a formula is shown as it was written. */
function rendered({ content, info, block }) {
  try {
    const options = { displayMode: block, throwOnError: true, trust: false, ...LIMITS };
    return temml.renderToString(content, options).replace(/ style="[^"]*"/g, ""); // the page's policy allows none
  } catch {
    const text = document.createElement("code");
    text.textContent = info;
    return text.outerHTML;
  }
}
