// Markdown of a model, which nobody should trust, made into elements that can do nothing but be read.

import { formulas } from "./formulas.js";
import highlighter from "./vendor/highlight.min.js";
import markdownit from "./vendor/markdown-it.esm.min.mjs";
import "./vendor/purify.min.js"; // which leaves its name in the window

const { DOMPurify } = window;

// HTML in an answer is shown as text; DOMPurify is the second wall behind that.
const markdown = markdownit({ html: false, linkify: true, highlight });
markdown.use(formulas);
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // "readme.md" is no address

// Nothing is loaded from the network: a picture becomes a link to itself.
markdown.renderer.rules.image = (tokens, i) => {
  const address = markdown.utils.escapeHtml(tokens[i].attrGet("src") ?? "");
  const words = markdown.utils.escapeHtml(tokens[i].content || "picture");
  return `<a href="${address}">${words}</a>`;
};

// Columns are aligned by an attribute, since the page's policy allows no styles in elements.
markdown.renderer.rules.th_open = markdown.renderer.rules.td_open = (tokens, i, options, _, renderer) => {
  const side = /(left|center|right)/.exec(tokens[i].attrGet("style"))?.[0];
  tokens[i].attrs = side ? [["align", side]] : null;
  return renderer.renderToken(tokens, i, options);
};

const MOST_COLOURED = 50_000; // characters of code

/** Code in colours, as HTML; "" if its language is not known. */
function highlight(code, language) {
  if (!highlighter.getLanguage(language) || code.length > MOST_COLOURED) return "";
  return highlighter.highlight(code, { language, ignoreIllegals: true }).value;
}

// Of formulas, what Temml writes.
const MATH_TAGS = [
  "math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom", "mprescripts",
  "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr",
  "munder", "munderover", "none",
];
const MATH_ATTRIBUTES = [
  "accent", "accentunder", "columnalign", "columnspan", "depth", "display", "displaystyle", "fence", "form", "height",
  "largeop", "linethickness", "lspace", "mathvariant", "maxsize", "minsize", "movablelimits", "notation", "rowspan",
  "rspace", "scriptlevel", "separator", "stretchy", "symmetric", "voffset", "width",
];

const RULES = {
  ALLOWED_TAGS: [
    ...MATH_TAGS,
    "a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: [...MATH_ATTRIBUTES, "href", "title", "start", "align", "class"],
  ADD_URI_SAFE_ATTR: [...MATH_ATTRIBUTES, "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** Show Markdown in an element. What has not changed since the last time stays: selections and screen readers care. */
export function render(element, text) {
  const before = [...element.childNodes];
  const after = [...fragment(text).childNodes];
  let same = 0;
  while (same < before.length && same < after.length && before[same].isEqualNode(after[same])) same++;
  for (const node of before.slice(same)) node.remove();
  element.append(...after.slice(same));
}

function fragment(text) {
  const made = DOMPurify.sanitize(markdown.render(text), RULES);
  for (const link of made.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const heading of made.querySelectorAll("h1, h2, h3, h4, h5, h6")) lower(heading);
  for (const table of made.querySelectorAll("table")) scrollable(table, "Table");
  for (const pre of made.querySelectorAll("pre")) frame(pre);
  for (const formula of made.querySelectorAll("math[display=block]")) scrollable(formula, "Formula");
  return made;
}

/** Headings of an answer rank below those of the page, but look as the model meant them. */
function lower(heading) {
  const rank = Number(heading.tagName[1]);
  heading.setAttribute("role", "heading");
  heading.setAttribute("aria-level", String(Math.min(rank + 3, 6)));
}

/** What is too wide scrolls by itself, with the keyboard too. */
function scrollable(element, name) {
  const box = document.createElement("div");
  box.className = "scroll";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", name);
  element.replaceWith(box);
  box.append(element);
  return box;
}

/** A block of code gets a line with its language and a button to copy it. */
function frame(pre) {
  const code = pre.querySelector("code");
  const language = /^language-(\S+)/.exec(code?.className ?? "")?.[1] ?? "";
  code?.removeAttribute("class");
  const box = document.createElement("div");
  box.className = "code";
  const head = document.createElement("div");
  head.className = "code-head";
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.dataset.copy = "code";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy code");
  head.append(language, button);
  const scrolling = scrollable(pre, language ? `Code, ${language}` : "Code");
  scrolling.replaceWith(box);
  box.append(head, scrolling);
}
