"use strict";
// What the views share: the data, elements made of text, which view is shown. read, judge and result follow.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

/** A new element. Children are elements or texts; nothing is ever read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Control characters as their pictures (␛), so that they are seen and do nothing. */
function visible(text) {
  return text.replace(/\r\n/g, "\n").replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (c) =>
    String.fromCharCode(c === "\u007f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));
}

/** What somebody wrote, as it is, with blocks of code in their own letters. A long one scrolls, by keyboard too. */
function textBox(text, label) {
  const box = make("div", { class: "text", dir: "auto", tabindex: "0", role: "group", "aria-label": label });
  if (!text) box.append(make("em", { class: "quiet" }, "(empty)"));
  visible(text).split(/(^```[^\n]*\n[^]*?^```[ \t]*(?:\n|$))/m).forEach((part, i) => {
    if (part) box.append(i % 2 ? make("code", {}, part) : part);
  });
  return box;
}

/** A conversation's turns. */
function turns(messages) {
  return messages.map(({ role, content }) =>
    make("div", { class: `turn ${role === "user" ? "user" : ""}` },
      make("div", { class: "role" }, role), textBox(content, `${role}'s turn`)));
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
}

const words = (text) => (text.trim() ? text.trim().split(/\s+/).length : 0);
const percent = (share) => `${Math.round(100 * share)}%`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** The score of a label's answer, or null. */
const score = (row, judge, label, sample = 0) => row.scores[judge]?.[label]?.[sample] ?? null;

/** Mean of values in [0, 1] with Wilson's 95% interval, a group counting once; as statistics.wilson does. */
function wilson(values, groups) {
  if (!values.length) return null;
  const p = mean(values), n = new Set(groups).size, z = 1.959964;
  const middle = p + (z * z) / (2 * n), scale = 1 + (z * z) / n;
  const half = z * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n));
  return { mean: p, low: (middle - half) / scale, high: (middle + half) / scale, rows: values.length };
}

const VIEWS = { report: () => {}, read: () => showRead(), judge: () => showJudge() };

/** Shows the view that the address names: #report, #read, #read-17 (the seventeenth prompt), #judge. */
function route() {
  const name = location.hash.slice(1).split("-")[0];
  const view = name in VIEWS ? name : "report";
  for (const other of Object.keys(VIEWS)) at(`${other}-view`).hidden = other !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  VIEWS[view]();
}

/** Whether a key is meant for the view, not for a field or the browser. */
function isForView(event, view) {
  const field = event.target.closest?.("input, select, textarea");
  const typing = field && field.type !== "checkbox";
  return !at(`${view}-view`).hidden && !typing && !event.ctrlKey && !event.metaKey && !event.altKey;
}

addEventListener("hashchange", route);
addEventListener("DOMContentLoaded", route);
