// Read: prompts in a list, all answers to one of them side by side.

const SHOWN = 50; // prompts in the list at a time: thousands of links would make each step slow
let found = []; // rows that pass the filters, in order, by their place in the data
let first = 0; // of the list
let current = 0; // the row that is shown

/** How much higher our answer scores than theirs; the difference in words where no judge was asked. */
function marginOf(row, judge = at("by").value) {
  const [ours, theirs] = [at("ours").value, at("theirs").value];
  if (!judge) return words(row.answers[ours]?.[0] ?? "") - words(row.answers[theirs]?.[0] ?? "");
  const [a, b] = [score(row, judge, ours), score(row, judge, theirs)];
  return a === null || b === null ? null : a - b;
}

/** Above 0 where two judges prefer different answers, more so where both are sure (in units of their spread). */
function disagreements() {
  const spread = data.judges.map((judge) =>
    Math.sqrt(mean(data.rows.map((row) => (marginOf(row, judge) ?? 0) ** 2))) || 1);
  return data.rows.map((row) => {
    const margins = data.judges.map((judge, i) => (marginOf(row, judge) ?? 0) / spread[i]);
    return -Math.max(...margins) * Math.min(...margins);
  });
}

const texts = data.rows.map((row) => () => // joined at the first search
  [...row.prompt.map((turn) => turn.content), ...Object.values(row.answers).flat()].join("\n").toLowerCase());

function passes(row, i, wanted) {
  const margin = marginOf(row);
  if (wanted.dataset && row.dataset !== wanted.dataset) return false;
  if (wanted.won && (margin === null || Math.sign(margin) !== Number(wanted.won))) return false;
  if (wanted.margin > 0 && Math.abs(margin ?? 0) < wanted.margin) return false;
  return !wanted.words || texts[i]().includes(wanted.words);
}

function filter() {
  const wanted = { dataset: at("dataset").value, won: at("won").value === "any" ? "" : at("won").value,
    margin: Number(at("margin").value), words: at("words").value.trim().toLowerCase() };
  found = data.rows.flatMap((row, i) => (passes(row, i, wanted) ? [i] : []));
  const keys = { differ: () => data.rows.map((row) => Math.abs(marginOf(row) ?? 0)), disagree: disagreements };
  const key = keys[at("order").value]?.();
  if (key) found.sort((i, j) => key[j] - key[i] || i - j);
  if (found.length) current = found[0];
  at("found").textContent = `${found.length} of ${data.rows.length} prompts`;
  showList(0);
}

/** The part of the list that holds a place. */
function showList(place) {
  first = place - (place % SHOWN);
  at("prompts").replaceChildren(...found.slice(first, first + SHOWN).map((i) => {
    const row = data.rows[i], margin = marginOf(row);
    const says = margin === null ? "" : margin === 0 ? "even"
      : `${(margin > 0 ? at("ours") : at("theirs")).value} +${short(Math.abs(margin))}`;
    const link = make("a", { href: `#read-${i + 1}` },
      make("span", { dir: "auto" }, visible(row.prompt.at(-1)?.content ?? "").slice(0, 120)),
      make("span", { class: "quiet" }, `${i + 1} · ${says}`));
    if (i === current) link.setAttribute("aria-current", "true");
    return make("li", {}, link);
  }));
  const last = Math.min(found.length, first + SHOWN);
  at("where").textContent = found.length ? `${first + 1} to ${last}` : "";
  at("earlier").disabled = first === 0;
  at("later").disabled = last === found.length;
}

const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));

/** The facts of an answer in a line: scores, words, whether it was cut off. */
function facts(row, label, sample) {
  const parts = data.judges.map((judge) => `${judge} ${short(score(row, judge, label, sample))}`);
  parts.push(`${words(row.answers[label][sample])} words`);
  if (!row.ended[label][sample]) parts.push("cut off");
  return parts.join(" · ");
}

function answerCard(row, label, best) {
  const card = make("section", { class: "card", "aria-label": `Answer of ${label}` },
    make("h3", {}, label), make("p", { class: "quiet" }, facts(row, label, 0)));
  if (best) card.append(make("p", { class: "won" }, `highest by ${at("by").value}`));
  card.append(textBox(row.answers[label][0], `Answer of ${label}`));
  const more = row.answers[label].length - 1;
  if (more > 0) {
    const details = make("details", {}, make("summary", {}, `${more} more samples`));
    details.addEventListener("toggle", () => { // made when they are asked for
      if (details.childElementCount > 1) return;
      for (let k = 1; k <= more; k++)
        details.append(make("p", { class: "quiet" }, facts(row, label, k)),
          textBox(row.answers[label][k], `Sample ${k + 1}`));
    });
    card.append(details);
  }
  return card;
}

function showPrompt() {
  const row = data.rows[current], labels = Object.keys(row.answers);
  const scores = labels.map((label) => score(row, at("by").value, label)).filter((value) => value !== null);
  const highest = scores.length > 1 && Math.max(...scores) > Math.min(...scores) ? Math.max(...scores) : null;
  at("prompt").replaceChildren(
    make("p", { class: "quiet" }, `Prompt ${current + 1} of ${data.rows.length} · ${row.dataset} · `,
      make("a", { href: `#read-${current + 1}` }, "link to this prompt")),
    ...turns(row.prompt),
    make("div", { class: "answers" }, ...labels.map((label) =>
      answerCard(row, label, highest !== null && score(row, at("by").value, label) === highest))));
}

function showRead() {
  const number = Number(location.hash.split("-")[1]);
  if (number >= 1 && number <= data.rows.length) current = number - 1;
  else if (found.length) current = found[0];
  showList(Math.max(0, found.indexOf(current)));
  showPrompt();
}

function step(by) {
  const place = found.indexOf(current) + by;
  if (place < 0 || place >= found.length) return;
  location.hash = `read-${found[place] + 1}`;
  route(); // the address may be the same: a filter had led away from it
}

const named = (values) => values.map((value) => [value, value]);
options(at("dataset"), [["", "all"], ...named([...new Set(data.rows.map((row) => row.dataset))])]);
options(at("ours"), named(data.labels));
options(at("theirs"), named(data.labels));
at("theirs").value = data.baseline ?? data.labels.at(-1);
at("ours").value = data.labels.find((label) => label !== at("theirs").value) ?? data.labels[0];
options(at("by"), data.judges.length ? named(data.judges) : [["", "words"]]);
options(at("won"), [["any", "any"], ["1", "the first"], ["-1", "the second"], ["0", "neither"]]);
const orders = [["", "as in the data"], ["differ", "where the two differ most"]];
if (data.judges.length > 1) orders.push(["disagree", "where the judges disagree"]);
options(at("order"), orders);
filter();
at("filters").addEventListener("input", () => { filter(); showPrompt(); });
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("earlier").addEventListener("click", () => showList(first - SHOWN));
at("later").addEventListener("click", () => showList(first + SHOWN));
addEventListener("keydown", (event) => {
  if (!isForView(event, "read")) return;
  const steps = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 };
  if (event.key in steps) step(steps[event.key]);
  else if (event.key === "/") at("words").focus();
  else return;
  event.preventDefault();
});
