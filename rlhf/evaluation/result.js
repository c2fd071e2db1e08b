// What the votes of a session say, once it has ended: who won, who agrees, and what to type next.

function table(caption, columns, rows) {
  return make("div", { class: "wide" }, make("table", {}, make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows.map(([name, ...cells]) =>
      make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell)))))));
}

const share = (found) => (found === null ? "–"
  : `${percent(found.mean)} (${Math.round(100 * found.low)}–${Math.round(100 * found.high)})`);

const promptOf = (i) => JSON.stringify(data.rows[i].prompt); // pairs of a ranking share one

/** How often the label's answer was preferred to the other's, or to anybody's; as people.wins_of does. */
function winsOf(label, other = null) {
  const own = judged(session.votes).filter(({ left: [a], right: [b] }) =>
    a !== b && (a === label || b === label) && (other === null || a === other || b === other));
  const values = own.map(({ left: [a], vote }) =>
    SIDES.includes(vote) ? Number((vote === "left") === (a === label)) : 0.5);
  return wilson(values, own.map(({ i }) => promptOf(i)));
}

/** How often a judge scores the answer higher that was preferred. */
function agreement(judge) {
  const own = session.votes.filter(({ vote }) => SIDES.includes(vote)).map(({ i, left, right, vote }) => {
    const [better, worse] = vote === "left" ? [left, right] : [right, left];
    return [i, score(data.rows[i], judge, ...better), score(data.rows[i], judge, ...worse)];
  });
  const known = own.filter(([, better, worse]) => better !== null && worse !== null);
  return wilson(known.map(([, better, worse]) => (1 + Math.sign(better - worse)) / 2), known.map(([i]) => promptOf(i)));
}

function showResult() {
  recall();
  const votes = judged(session.votes), labels = data.labels.filter((label) => winsOf(label));
  const baseline = labels.includes(data.baseline) && labels.length > 2 ? data.baseline : null;
  const count = (kind) => session.votes.filter(({ vote }) => vote === kind).length;
  const tables = [make("p", {}, `${votes.length} votes: ${count("left")} left, ${count("right")} right, ` +
    `${count("tie")} tied, ${count("both bad")} both bad; ${count("skip")} skipped. ` +
    "A tie counts half; in brackets Wilson's 95% interval.")];
  if (labels.length) tables.push(table("by your votes",
    ["model", "wins", ...(baseline ? [`wins against ${baseline}`] : []), "votes"], labels.map((label) =>
      [label, share(winsOf(label)), ...(baseline ? [label === baseline ? "–" : share(winsOf(label, baseline))] : []),
        String(winsOf(label).rows)])));
  const judges = data.judges.filter((judge) => agreement(judge));
  if (judges.length) tables.push(table("judges beside you", ["judge", "agrees with you", "votes"],
    judges.map((judge) => [judge, share(agreement(judge)), String(agreement(judge).rows)])));
  at("result-tables").replaceChildren(...tables);
  const models = Object.keys(data.models).sort((a, b) => (winsOf(b)?.mean ?? 0) - (winsOf(a)?.mean ?? 0));
  const model = session.what.startsWith("samples ") ? session.what.slice(8) : models[0];
  at("next").replaceChildren(make("p", {}, "Save votes.jsonl, and move it into the report's folder."),
    ...data.next.flatMap(([why, command]) => [make("p", {}, `${why}:`),
      make("pre", { tabindex: "0" }, command.replace("<MODEL>", () => data.models[model]))]));
  phase("result");
  at("result-title").focus();
}
