// Judge: two answers to one prompt, nobody knows whose. All that says which model wrote what stays in variables.

let session = null; // {name, what, votes, pairs, shown, since}; a vote is {i, left, right, vote, time}, an answer [label, sample]
const SIDES = ["left", "right"], VOTES = [...SIDES, "tie", "both bad", "skip"];

/** A well mixed 32-bit number of a text (FNV-1a, then murmur's last steps): order and sides are drawn by it. */
function hash(text) {
  let h = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

/** The items in an order that the seed and what they are called decide. */
function shuffled(items, salt, name = String) {
  return items.map((item) => [hash(`${data.seed} ${salt} ${name(item)}`), item]).sort((a, b) => a[0] - b[0])
    .map(([, item]) => item);
}

const twoOf = (items) => items.flatMap((a, k) => items.slice(k + 1).map((b) => [a, b]));

/** What can be compared: {what: [title, the pairs of answers of each prompt]}. */
function choices() {
  const labels = data.labels, every = twoOf(labels.map((label) => [label, 0])), found = {}, samples = {};
  const against = (other) => every.filter((pair) => pair.some(([label]) => label === other));
  if (data.baseline && labels.length > 2)
    found.baseline = [`each model with ${data.baseline}`, against(data.baseline)];
  if (every.length) found.models = [labels.length > 2 ? "every two of them" : labels.join(" with "), every];
  for (const pair of labels.length > 2 ? every : [])
    found[JSON.stringify(pair)] = [`${pair[0][0]} with ${pair[1][0]}`, [pair]];
  for (const label of labels) {
    const most = data.rows.reduce((n, row) => Math.max(n, row.answers[label]?.length ?? 0), 0);
    if (most > 1) samples[`samples ${label}`] = [`samples of ${label}, two at a time`,
      twoOf([...Array(most).keys()].map((k) => [label, k]))];
  }
  // the first is what is offered: of a single model its samples
  return Object.keys(data.models).length === 1 ? { ...samples, ...found } : { ...found, ...samples };
}

const textOf = (i, [label, sample]) => data.rows[i].answers[label]?.[sample];
const keyOf = ({ i, left, right }) => JSON.stringify([i, ...[left, right].map(String).sort()]);

/** Whether an answer is there, and no earlier sample of the same text. */
const isFirst = (i, [label, sample]) => data.rows[i].answers[label]?.indexOf(textOf(i, [label, sample])) === sample;

/**
 * The pairs to judge: each prompt once before any comes again, and all comparisons about equally often at any time.
 * With a baseline no prompt comes again: the answer that one has seen before would be the baseline's.
 * Which and in what order the seed decides, so that several people judge the same; on which side an answer stands its
 * judge's name does, too, and of each comparison as many stand on one side as on the other.
 */
function draw(what, name) {
  const pairs = choices()[what][1], places = [...data.rows.keys()], drawn = pairs.map(() => []);
  const samples = what.startsWith("samples"); // all of them are one comparison
  // where a prompt starts among the pairs is drawn apart from when it is shown: the order tells nothing
  const offsets = new Map(shuffled(places, "offsets").map((i, k) => [i, k % pairs.length]));
  const order = shuffled(places, "prompts"), found = [], asked = new Set();
  for (let round = 0; round < pairs.length; round++)
    for (const i of order) {
      const place = (offsets.get(i) + round) % pairs.length, [a, b] = pairs[place];
      if (!isFirst(i, a) || !isFirst(i, b) || textOf(i, a) === textOf(i, b)) continue;
      if (what === "baseline" && asked.has(promptOf(i))) continue;
      asked.add(promptOf(i));
      const pair = { i, left: a, right: b };
      pair.key = keyOf(pair);
      found.push(pair);
      drawn[samples ? 0 : place].push(pair);
    }
  for (const comparison of drawn)
    shuffled(comparison, `sides ${name}`, (pair) => pair.key).forEach((pair, k) => {
      if (k % 2) [pair.left, pair.right] = [pair.right, pair.left];
    });
  return found;
}

// Votes are kept in the browser, by report and by judge. Some browsers keep nothing for files.
const place = (name) => `votes ${data.id} ${name}`;

function kept(name) {
  try { return JSON.parse(localStorage.getItem(place(name))); } catch { return null; }
}

let keeps = true;

function keep() {
  const { name, what, votes } = session;
  keeps = true;
  try {
    localStorage.setItem(place(name), JSON.stringify({ name, what, votes }));
    localStorage.setItem(place(""), JSON.stringify({ name, what }));
  } catch { keeps = false; }
  for (const notice of document.querySelectorAll(".storage")) notice.hidden = keeps;
}

/** Takes up what another tab has kept since: what is written next must not lose it. */
function recall() {
  if (keeps) session.votes = kept(session.name)?.votes ?? session.votes;
}

/** Starts, or goes on with the votes that are kept. */
function start(name, what, votes = kept(name)?.votes ?? []) {
  session = { name, what, votes, pairs: draw(what, name), saved: votes.length };
  keep();
  phase("voting");
  showPair();
  at("voting").focus();
}

function phase(name) {
  for (const part of ["setup", "voting", "result"]) at(part).hidden = part !== name;
}

function showJudge() {
  if (session) return;
  phase("setup");
  const last = kept("");
  if (!last || at("judge-name").value) return;
  at("judge-name").value = last.name;
  if (last.what in choices()) at("what").value = last.what;
  const count = kept(last.name)?.votes.length ?? 0;
  at("setup-says").textContent = `${count} votes of ${last.name} are kept in this browser: Start goes on.`;
}

/** The pairs without a vote. */
function openPairs() {
  const done = new Set(session.votes.map(keyOf));
  return session.pairs.filter((pair) => !done.has(pair.key));
}

const judged = (votes) => votes.filter(({ vote }) => vote !== "skip");

/** Half the width of the interval at a rate of a half: of the number of votes alone, which tells of no model. */
function reach() {
  const count = judged(session.votes).length, pairs = choices()[session.what][1];
  if (!count) return "";
  const shares = data.labels.map((label) => mean(pairs.map((pair) => Number(pair.some(([own]) => own === label)))));
  const expected = Math.round(count * Math.min(...shares.filter(Boolean))); // votes of the rarest model
  const fewest = Math.min(Math.max(1, expected), data.rows.length);
  const { low, high } = wilson(Array(fewest).fill(0.5), [...Array(fewest).keys()]);
  return ` · so far the result is known within ±${Math.ceil(50 * (high - low))} points`;
}

function showPair() {
  const open = openPairs(), [pair] = open, all = session.pairs.length;
  session.shown = pair;
  session.since = performance.now();
  at("progress").max = Math.max(all, 1);
  at("progress").value = all - open.length;
  at("counts").textContent = `${all - open.length} of ${all} pairs${reach()}`;
  at("undo").disabled = !session.votes.length;
  at("all-judged").hidden = Boolean(pair);
  for (const button of document.querySelectorAll("[data-vote]")) button.disabled = !pair;
  at("asked").replaceChildren(...(pair ? turns(data.rows[pair.i].prompt) : []));
  at("pair").replaceChildren(...(pair ? SIDES : []).map((side) => {
    const title = side === "left" ? "Left" : "Right";
    return make("section", { class: "card", "aria-label": `${title} answer` },
      make("h3", { class: "role" }, title), textBox(textOf(pair.i, pair[side]), `${title} answer`));
  }));
}

function say(text) {
  at("said").textContent = text;
}

function vote(choice) {
  const { shown: pair } = session;
  if (!pair) return;
  recall();
  session.votes = [...session.votes.filter((vote) => keyOf(vote) !== pair.key),
    { i: pair.i, left: pair.left, right: pair.right, vote: choice, time: new Date().toISOString() }];
  keep();
  showPair();
  scrollTo({ top: 0 });
  if (!session.shown) at("end").focus(); // the buttons to vote with are no more
  say(`You said: ${choice}. ${session.shown ? "The next pair is shown." : "No pair is left."}`);
}

function undo() {
  recall();
  const last = session.votes.pop();
  if (!last) return;
  keep();
  showPair();
  say(`Undone: ${last.vote}.`);
}

/** The votes as lines of votes.jsonl, each whole by itself. */
function lines() {
  return session.votes.map(({ i, left, right, vote, time }) => JSON.stringify({
    prompt: data.rows[i].prompt, left: textOf(i, left), right: textOf(i, right), vote,
    left_model: left[0], left_sample: left[1], right_model: right[0], right_sample: right[1],
    judge: session.name, time, seed: data.seed, dataset: data.rows[i].dataset, report: data.id,
    held_out: data.held_out.includes(data.rows[i].dataset), comparison: session.what,
  }) + "\n").join("");
}

function save() {
  recall();
  const link = make("a", { download: "votes.jsonl" });
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.click();
  URL.revokeObjectURL(link.href);
  session.saved = session.votes.length;
}

/** Goes on with a saved file: its lines find their prompts and answers by their texts. */
function load(text, file) {
  const places = new Map();
  const said = (prompt) => JSON.stringify([prompt].flat().map((turn) => [turn?.role, turn?.content]));
  data.rows.forEach(({ prompt }, i) => places.set(said(prompt), [...(places.get(said(prompt)) ?? []), i]));
  const votes = [], names = new Set();
  let others = 0, what = at("what").value;
  for (const line of text.split("\n").filter((line) => line.trim())) {
    const row = JSON.parse(line) ?? {};
    const left = [row.left_model, row.left_sample], right = [row.right_model, row.right_sample];
    const i = places.get(said(row.prompt))
      ?.find((i) => textOf(i, left) === row.left && textOf(i, right) === row.right);
    if (i === undefined || !VOTES.includes(row.vote)) { others++; continue; }
    votes.push({ i, left, right, vote: row.vote, time: row.time });
    names.add(String(row.judge ?? "").trim() || file.replace(/\.jsonl$/, ""));
    if (Object.hasOwn(choices(), row.comparison)) what = row.comparison;
  }
  if (names.size > 1) return "These are votes of several people: load one person's.";
  if (!names.size) return "No vote in it is on this report's answers.";
  const [name] = names, latest = new Map(), when = ({ time }) => Date.parse(time) || 0;
  for (const vote of [...(kept(name)?.votes ?? []), ...votes])
    if (!(when(latest.get(keyOf(vote)) ?? {}) > when(vote))) latest.set(keyOf(vote), vote);
  at("judge-name").value = name;
  at("what").value = what;
  start(name, what, [...latest.values()].sort((a, b) => when(a) - when(b)));
  const leftOut = others ? ` ${others} are on another report's answers: left out.` : "";
  say(`${new Set(votes.map(keyOf)).size} votes of ${name} are loaded.${leftOut}`);
  return "";
}

options(at("what"), Object.entries(choices()).map(([what, [title]]) => [what, title]));
if (!at("what").value)
  at("setup-says").textContent = "There is one answer to each prompt: evaluate with a --baseline, or with --best_of.";
at("setup").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = at("judge-name").value.trim();
  if (name && at("what").value) start(name, at("what").value);
});
at("load").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  try { at("setup-says").textContent = load(await file.text(), file.name); } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    at("setup-says").textContent = "This is no votes.jsonl: a line of it is no JSON.";
  }
  event.target.value = "";
});
for (const button of document.querySelectorAll("[data-vote]"))
  button.addEventListener("click", () => vote(button.dataset.vote));
for (const button of document.querySelectorAll(".save")) button.addEventListener("click", save);
at("undo").addEventListener("click", undo);
at("end").addEventListener("click", showResult);
at("again").addEventListener("click", () => { phase("voting"); showPair(); });
/** Back to the choice of judge and comparison. */
function leave(says = "") {
  session = null;
  at("judge-name").value = "";
  at("setup-says").textContent = says;
  showJudge();
  at("judge-name").focus();
}

at("back").addEventListener("click", () => leave());
at("forget").addEventListener("click", () => {
  if (!confirm("Delete these votes from this browser? A file that you saved stays.")) return;
  try {
    localStorage.removeItem(place(session.name));
    localStorage.removeItem(place(""));
    leave();
  } catch { leave("This browser keeps nothing: there was nothing in it to delete."); }
});
addEventListener("keydown", (event) => {
  if (!isForView(event, "judge") || at("voting").hidden || !at("keys").checked || event.repeat) return;
  const votes = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", b: "both bad", s: "skip" };
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key; // caps lock may be on
  // a key that was meant for the pair before says nothing of this one
  if (key in votes) { if (performance.now() - session.since > 150) vote(votes[key]); }
  else if (key === "u") undo();
  else return;
  event.preventDefault();
});
addEventListener("beforeunload", (event) => { // only where nothing keeps them
  if (session && !keeps && session.votes.length > session.saved) event.preventDefault();
});
