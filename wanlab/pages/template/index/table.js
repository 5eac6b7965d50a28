// The table: one row per run, what was measured before what was asked for (its name says that already).
const sheet = document.getElementById("sheet");
const best = {};
for (const c of metrics.filter(c => c.better)) {
  const values = every.map(i => measured(c.key, i)).filter(v => !Number.isNaN(v));
  if (new Set(values).size > 1) best[c.key] = c.better === "min" ? Math.min(...values) : Math.max(...values);
}
const front = state.x ? efficient(state.x, state.y) : new Set();

const nameCell = (i) => {
  const run = runs[i], head = el("th", { scope: "row" });
  const box = el("input", { type: "checkbox", checked: selected.has(i), disabled: run.state !== "finished" });
  box.setAttribute("aria-label", `show ${run.title}`);
  box.addEventListener("change", () => choose(i, box.checked));
  const name = el("span", { className: "name", textContent: run.title, title: run.label });
  const tags = el("span", { className: "tags" });
  if (run.baseline) tags.append(el("span", { className: "tag base", textContent: "baseline" }));
  if (run.state !== "finished") tags.append(el("span", { className: `state ${run.state}`, textContent: board.states[run.state] }));
  const effect = Object.keys(table).find(key => key === "m.effect");
  if (effect && table[effect][i] === board.not_applied) tags.append(el("span", { className: "tag warn", textContent: board.not_applied }));
  if (run.apart) tags.append(el("span", { className: "tag warn", textContent: `other ${run.apart}`, title: "not the work of its baseline: no ratio" }));
  for (const [what, words] of [["report", "report"], ["notebook", "notebook"]]) {
    if (run[what]) tags.append(el("a", { href: run[what], textContent: words }));
  }
  head.append(el("label", {}, box, name), tags);
  return head;
};
const metricCell = (c, i) => {
  const value = measured(c.key, i), made = el("td", { className: "number" });
  if (Number.isNaN(value)) return made;
  made.append(el("span", { className: value === best[c.key] ? "best" : "", textContent: show(c, value) }));
  const under = [];
  if (c.low && typeof table[c.low][i] === "number") under.push(`${show(c, table[c.low][i])} to ${show(c, table[c.high][i])}`);
  if (against(c.key, i)) under.push(against(c.key, i));
  under.forEach(text => made.append(el("small", { textContent: text })));
  return made;
};
const rows = every.map((i) => {
  const row = el("tr", { className: runs[i].baseline ? "baseline" : "" });
  row.dataset.run = i;
  row.append(nameCell(i));
  for (const c of metrics) row.append(metricCell(c, i));
  for (const c of parameters) {
    const value = table[c.key][i];
    row.append(el("td", { className: typeof value === "number" ? "number" : "", textContent: value === null ? "" : String(value) }));
  }
  row.addEventListener("pointerenter", () => tell("hover", i));
  row.addEventListener("pointerleave", () => tell("hover", null));
  return row;
});

// Heads are buttons: a click sorts, another turns the order round, a third goes back to the order of the sweep.
const body = el("tbody");
let sorted = { key: null, up: true };
const heads = [];
const keyed = (key) => {
  if (key === "") return i => runs[i].title;
  return column[key].kind === "metric" ? i => measured(key, i) : i => table[key][i];
};
const none = v => v === null || v === undefined || Number.isNaN(v);
const arrange = () => {
  let order = every;
  if (sorted.key === null) {
    order = [...every].sort((a, b) => runs[b].baseline - runs[a].baseline || a - b);
  } else {
    const of = keyed(sorted.key), sign = sorted.up ? 1 : -1;
    order = [...every].sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      if (none(x) || none(y)) return none(x) - none(y) || a - b;  // what has no value stays last
      const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return sign * less || a - b;
    });
  }
  body.replaceChildren(...order.map(i => rows[i]));
  for (const { head, key } of heads) head.setAttribute("aria-sort", key !== sorted.key ? "none" : sorted.up ? "ascending" : "descending");
};
const headOf = (key, title, unit, number, better) => {
  const button = el("button", { type: "button" }, el("span", { textContent: title }));
  if (unit) button.append(el("small", { textContent: unit }));
  if (better) button.title = `${better === "min" ? "lower" : "higher"} is better`;
  button.addEventListener("click", () => {
    const first = better !== "max";
    if (sorted.key !== key) sorted = { key, up: first };
    else if (sorted.up === first) sorted = { key, up: !first };
    else sorted = { key: null, up: true };
    arrange();
  });
  const head = el("th", { scope: "col", className: number ? "number" : "" }, button);
  heads.push({ head, key });
  return head;
};
const numeric = key => table[key].some(v => typeof v === "number");
const headRow = el("tr", {}, headOf("", "run"),
  ...metrics.map(c => headOf(c.key, c.title, c.unit, true, c.better)),
  ...parameters.map(c => headOf(c.key, c.title, c.unit, numeric(c.key))));
sheet.append(el("table", { className: "runs" }, el("thead", {}, headRow), body));
arrange();

const mark = () => rows.forEach((row, i) => {
  row.classList.toggle("chosen", selected.has(i));
  row.querySelector("input").checked = selected.has(i);
});
mark();
on("select", mark);
on("filter", () => rows.forEach((row, i) => { row.hidden = !visible.has(i); }));
on("hover", i => rows.forEach((row, j) => row.classList.toggle("hovered", i === j)));

const wholeTable = () => {
  const keys = Object.keys(table);
  const names = { name: "name", "": "" };
  return [
    ["label", "run_id", "baseline", ...keys.map(key => names[key] || key)],
    ...every.map(i => [runs[i].label, runs[i].id, runs[i].baseline, ...keys.map(key => table[key][i])]),
  ];
};
const save = el("button", { type: "button", className: "quiet", textContent: "download CSV", title: "every column of every run" });
save.addEventListener("click", () => download(`${board.name}.csv`, wholeTable()));
const compared = Object.keys(ratios).length ? "×: times better than the baseline; within noise: no difference can be told from it" : "";
document.getElementById("table-note").append(compared, save);
sheet.classList.toggle("long", runs.length > 40);
edges(sheet);
