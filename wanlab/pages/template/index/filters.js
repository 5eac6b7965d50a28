// One row of filters for the whole page.
const filters = document.getElementById("filters");
const query = el("input", { type: "search", placeholder: "search runs", autocomplete: "off" });
query.setAttribute("aria-label", "search runs");
const count = el("span", { className: "count" });
count.setAttribute("role", "status");
const clear = el("button", { type: "button", className: "quiet", textContent: "clear", hidden: true });
const picks = [];
const pick = (title, options, has) => {
  const select = el("select", {}, el("option", { value: "", textContent: `any ${title}` }));
  select.setAttribute("aria-label", title);
  options.forEach(([value, words], at) => select.append(el("option", { value: String(at), textContent: words })));
  select.addEventListener("change", () => { select.classList.toggle("set", select.value !== ""); sift(); });
  picks.push({ select, passes: i => select.value === "" || has(i, options[Number(select.value)][0]) });
  return select;
};
const haystack = every.map(i => [
  runs[i].title, runs[i].label, runs[i].id, board.states[runs[i].state], table.reason[i], table.verdict[i],
  ...parameters.map(c => table[c.key][i]),
].filter(Boolean).join("\n").toLowerCase());
const sift = () => {
  const words = query.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  visible = new Set(every.filter(i => words.every(word => haystack[i].includes(word)) && picks.every(p => p.passes(i))));
  const all = visible.size === runs.length;
  count.textContent = all ? `${runs.length} runs` : `${visible.size} of ${runs.length} runs`;
  clear.hidden = all && !query.value;
  tell("filter");
};
filters.append(query);
for (const c of parameters) {
  if (c.few && c.few.length > 1) filters.append(pick(c.title, c.few.map(v => [v, String(v)]), (i, v) => table[c.key][i] === v));
}
if (Object.keys(board.states).length > 1) {
  filters.append(pick("state", Object.entries(board.states), (i, v) => runs[i].state === v));
}
if (new Set(runs.map(run => run.machine)).size > 1) {
  filters.append(pick("machine", [...new Set(runs.map(run => run.machine))].filter(Boolean).map(v => [v, v]), (i, v) => runs[i].machine === v));
}
filters.append(count, clear);
filters.addEventListener("submit", event => event.preventDefault());
let waiting = 0;
query.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(sift, runs.length > 200 ? 120 : 0); });
clear.addEventListener("click", () => {
  query.value = "";
  picks.forEach(({ select }) => { select.value = ""; select.classList.remove("set"); });
  sift();
});
count.textContent = `${runs.length} runs`;
