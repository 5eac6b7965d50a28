// What is shown and what is chosen; every part of the page listens here.
const board = JSON.parse(document.getElementById("board").textContent);
const { runs, columns, table, ratios, same } = board;
const every = runs.map((_, i) => i);
let visible = new Set(every);
const selected = new Set(board.selected);
const listeners = { filter: [], select: [], hover: [] };
const on = (what, listener) => listeners[what].push(listener);
const tell = (what, detail) => listeners[what].forEach(listener => listener(detail));
const choose = (i, yes = !selected.has(i)) => {
  if (yes) selected.add(i); else selected.delete(i);
  tell("select");
};

const column = Object.fromEntries(columns.map(c => [c.key, c]));
const parameters = columns.filter(c => c.kind === "parameter"), metrics = columns.filter(c => c.kind === "metric");
const ODD = { inf: Infinity, "-inf": -Infinity, nan: NaN };
// A measured value as a number; NaN where there is none.
const measured = (key, i) => {
  const value = runs[i].state === "finished" ? table[key][i] : null;
  return typeof value === "number" ? value : typeof value === "string" && value in ODD ? ODD[value] : NaN;
};

// As many decimals for a whole column as its typical value needs.
const decimals = (values) => {
  const sizes = values.filter(v => Number.isFinite(v) && v !== 0).map(Math.abs).sort((a, b) => a - b);
  if (!sizes.length) return 0;
  if (sizes.every(Number.isInteger)) return 0;
  const power = Math.floor(Math.log10(sizes[sizes.length >> 1]));
  return Math.min(8, Math.max(0, power < 0 ? 1 - power : 2 - power));
};
for (const c of metrics) {
  const digits = decimals(every.map(i => measured(c.key, i)));
  c.format = new Intl.NumberFormat("en", {
    minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: c.signed ? "exceptZero" : "auto",
  });
}
const show = (c, value) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  if (value === Infinity || value === "inf") return "∞";
  if (value === -Infinity || value === "-inf") return "-∞";
  return c.format && typeof value === "number" ? c.format.format(value) : String(value);
};
const times = ratio => `${ratio.toFixed(ratio >= 100 ? 0 : ratio >= 10 ? 1 : 2)}×`;
// What a ratio says, in words: first whether it can be told from noise.
const against = (key, i) => {
  const ratio = ratios[key] && ratios[key][i];
  if (!ratio) return "";
  return same[key] && same[key][i] ? "within noise" : times(ratio);
};
const titled = c => c.unit ? `${c.title} (${c.unit})` : c.title;

// Which runs no other beats on both axes; computed where the page was made.
const efficient = (x, y) => {
  const [i, j] = [board.axes.indexOf(x), board.axes.indexOf(y)];
  return new Set(i < 0 || j < 0 || i === j ? [] : board.pairs[`${Math.min(i, j)},${Math.max(i, j)}`]);
};

// One colour for each value of a parameter that has few.
const coloured = parameters.filter(c => c.few && c.few.length > 1 && c.few.length <= 8);
const state = {
  x: board.start && board.start[0], y: board.start && board.start[1],
  colour: coloured.length ? coloured[0].key : null,
};
const tint = (i) => {
  const c = column[state.colour], at = c ? c.few.findIndex(v => String(v) === String(table[c.key][i])) : -1;
  return at < 0 ? "#3d85c6" : c.colours[at];
};
