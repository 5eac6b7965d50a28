// Figures: one theme, whose text and lines follow the page.
const figures = JSON.parse(document.getElementById("figures").textContent);
const places = [...document.querySelectorAll("[data-figure]")];
const stem = document.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40) || "figure";
// A flame graph can be searched: what does not match fades, and the share of what matches is said.
const searchable = (place) => {
  const { ids, parents, customdata, values, marker } = place.data[0];
  const row = Object.fromEntries(ids.map((id, i) => [id, i])), colours = [...marker.colors];
  const box = el("p", { className: "search" });
  box.innerHTML = '<input type="search" placeholder="search frames" aria-label="search frames"> <span role="status"></span>';
  place.before(box);
  box.firstChild.addEventListener("input", ({ target }) => {
    const text = target.value.trim().toLowerCase();
    const hit = customdata.map(([name]) => !text || name.toLowerCase().includes(text));
    // A frame below one that matches is part of it already.
    const inside = i => { for (let up = row[parents[i]]; up !== undefined; up = row[parents[up]]) if (hit[up]) return true; };
    const sum = text ? values.reduce((all, value, i) => hit[i] && !inside(i) ? all + value : all, 0) : 0;
    box.lastChild.textContent = text ? `${(100 * sum / values[0]).toFixed(1)} % of all, ${(sum / 1e3).toFixed(2)} ms` : "";
    Plotly.restyle(place, { "marker.colors": [colours.map((colour, i) => hit[i] ? colour : colour + "30")] }, [0]);
  });
};
// On a phone: smaller letters, titles in lines, figures of bars beside or else inside of them, and the legend below.
const inLines = (text, most) => text.includes("<br>") ? text : text.split(" ").reduce((all, word) =>
  all && (all + " " + word).split("<br>").pop().length > most ? `${all}<br>${word}` : all ? `${all} ${word}` : word, "");
const LETTER = 6.4; // pixels of a letter of a phone's figure
const letters = (text) => Math.max(0, ...String(text).replace(/<(?!br)[^>]*>/g, "").split("<br>").map((line) => line.length)) * LETTER;
// The end of an axis from 0, so that the figure of every level bar has room beside it; undefined where that leaves no bars.
const beside = (data, layout, axis, wide) => {
  const level = data.filter((trace) => trace.type === "bar" && trace.orientation === "h");
  const bars = level.filter((trace) => (trace.xaxis ?? "x") === axis.replace("axis", ""));
  const plain = level.every((trace) => Array.isArray(trace.x) && Array.isArray(trace.y) && !trace.base && trace.x.every((value) => !(value < 0)));
  if (!plain || layout[axis]?.type === "log") return undefined;
  const names = level.flatMap((trace) => Array.isArray(trace.y[0]) ? [trace.y] : [[trace.y]]);
  const left = Math.max(0, ...names.map((levels) => levels.reduce((sum, level) => sum + Math.max(0, ...level.map(letters)) + 14, 0)));
  const [from, to] = layout[axis]?.domain ?? [0, 1], room = (wide - left - 24) * (to - from), sums = {};
  let end = 0, longest = 0;
  for (const trace of bars) trace.x.forEach((value, i) => {
    const row = JSON.stringify(Array.isArray(trace.y[0]) ? trace.y.map((level) => level[i]) : trace.y[i]);
    const reach = layout.barmode === "stack" ? (sums[row] = (sums[row] ?? 0) + (value ?? 0)) : value ?? 0;
    const text = Array.isArray(trace.text) ? trace.text[i] : trace.text;
    longest = Math.max(longest, reach);
    if (trace.textposition === "outside" && text) end = Math.max(end, reach / Math.max(0.01, 1 - (letters(text) + 8) / room));
  });
  return end && end < 3.5 * longest ? Math.max(end, longest) : undefined;
};
const small = (data, layout, wide) => {
  const set = { width: undefined, font: { ...layout.font, size: 11 } };
  const outside = data.filter((trace) => trace.type === "bar" && trace.orientation === "h" && trace.textposition === "outside");
  for (const axis of new Set(outside.map((trace) => (trace.xaxis ?? "x").replace("x", "xaxis")))) {
    const end = beside(data, layout, axis, wide);
    if (end !== undefined) set[axis] = { ...layout[axis], range: [0, end], nticks: 5 };
    else outside.filter((trace) => (trace.xaxis ?? "x") === axis.replace("axis", "")).forEach((trace) => { trace.textposition = "auto"; });
  }
  for (const [key, axis] of Object.entries(layout)) {
    const text = /^[xy]axis\d*$/.test(key) && (axis.title?.text ?? axis.title);
    if (typeof text === "string") set[key] = { ...axis, ...set[key], title: { ...axis.title, text: inLines(text, key[0] === "x" ? 26 : 40) } };
  }
  if (layout.legend?.orientation === "v") set.legend = { ...layout.legend, orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top" };
  return set;
};
// A figure that would have no room beside its labels is wider than the phone, and scrolls.
const widen = (place, least) => {
  const box = el("div");
  place.before(box);
  box.append(place);
  place.style.minWidth = `${least}px`;
  edges(box);
};
// A mark of a figure that stands for a part of the trace selects it in the live view of the page, by the page's address.
const explorable = (place) => {
  const view = document.querySelector("[data-explorer]");
  if (!view || !place.data.some(trace => trace.meta?.explore)) return;
  place.classList.add("explorable");
  place.title = "Click a bar: its work in the live view below";
  place.on("plotly_click", ({ points: [{ data, pointNumber }] }) => {
    const state = data.meta?.explore?.[pointNumber];
    if (!state) return;
    const hash = new URLSearchParams(location.hash.slice(1));
    hash.set("explore", JSON.stringify(state));
    location.hash = hash;
    view.scrollIntoView({ block: "start" });
  });
};
const ROOM = 170, WIDENED = 760; // pixels
const cut = (place) => {
  const { left, right } = place.getBoundingClientRect();
  return [...place.querySelectorAll("svg text")].some((text) => {
    const box = text.getBoundingClientRect();
    return box.width && (box.left < left - 4 || box.right > right + 4);
  });
};
// Texts that stand level and lie over one another.
const crossed = (place) => {
  const level = text => { const { b, c } = text.getScreenCTM() ?? {}; return !b && !c; };
  const boxes = [...place.querySelectorAll("svg text")].filter(text => level(text) && text.textContent.trim() && !text.closest(".hoverlayer, .iciclelayer, .treemaplayer"))
    .map(text => text.getBoundingClientRect()).filter(box => box.width > 2).sort((one, other) => one.left - other.left);
  return boxes.some((one, i) => {
    for (let j = i + 1; j < boxes.length && boxes[j].left < one.right - 2; j++) if (boxes[j].top < one.bottom - 3 && boxes[j].bottom > one.top + 3) return true;
    return false;
  });
};
for (const place of window.Plotly ? places : []) {
  const number = Number(place.dataset.figure);
  const { data, config } = figures[number], whole = figures[number].layout;
  // A drawing may have another, upright, for a phone.
  const layout = narrow() && whole.meta?.phone ? { ...whole, ...whole.meta.phone, meta: {} } : whole;
  if (layout !== whole) place.style.height = `${layout.height}px`;
  const size = narrow() ? small(data, layout, place.clientWidth) : {};
  if (layout.meta?.least_px > place.clientWidth) widen(place, layout.meta.least_px);
  // The main figure ends with the first screen, if its letters stay apart.
  const high = innerHeight - place.getBoundingClientRect().top - scrollY - 16;
  if (place.closest(".main") && !narrow() && layout.height > high) {
    size.height = Math.round(Math.max(high, 0.66 * layout.height));
    place.style.height = `${size.height}px`;
  }
  Plotly.newPlot(place, data, { ...layout, ...size, autosize: true },
    { ...config, responsive: true, displaylogo: false, displayModeBar: false })
    .then(() => {
      if (!narrow() || layout !== whole || place.style.minWidth || (place._fullLayout._size.w > ROOM && !cut(place) && !crossed(place))) return;
      widen(place, WIDENED);
      const titles = Object.entries(layout).filter(([key, axis]) => /^xaxis\d*$/.test(key) && typeof axis.title?.text === "string");
      return Plotly.relayout(place, Object.fromEntries(titles.map(([key, axis]) => [`${key}.title.text`, axis.title.text])))
        .then(() => Plotly.Plots.resize(place));
    })
    .then(() => Plotly.relayout(place, { ...looks(), ...axes(place.layout) }))
    .then(() => { if (place.data[0]?.type === "icicle") searchable(place); explorable(place); place.dataset.drawn = "yes"; });
  dataControl(place, `${stem}-${number + 1}.csv`);
}
const repaint = () => places.forEach(p => p.layout && Plotly.relayout(p, { ...looks(), ...axes(p.layout) }));
dark.addEventListener("change", repaint);

// Columns of words are read from the left, columns of numbers from the right.
for (const table of document.querySelectorAll("table.dataframe:not(.typed)")) {
  const rows = [...table.tBodies].flatMap(body => [...body.rows]);
  const head = table.tHead ? [...table.tHead.rows] : [];
  // A first column that only counts rows says nothing.
  const index = rows.map(row => row.cells[0]);
  if (rows.length && index.every((cell, i) => cell && cell.tagName === "TH" && cell.textContent.trim() === String(i)) &&
      head.every(row => row.cells[0] && !row.cells[0].textContent.trim() && row.cells[0].colSpan === 1)) {
    [...head, ...rows].forEach(row => { row.cells[0].hidden = true; });
  }
  // The name of the index takes the empty corner of the head, and not a row of its own.
  if (head.length === 2 && head[0].cells[0] && !head[0].cells[0].textContent.trim() && head[0].cells.length === head[1].cells.length &&
      [...head[1].cells].slice(1).every(cell => !cell.textContent.trim())) {
    head[0].cells[0].textContent = head[1].cells[0].textContent;
    head.pop().remove();
  }
  const width = Math.max(0, ...rows.map(row => row.cells.length));
  for (let i = 0; i < width; i++) {
    const cells = rows.map(row => row.cells[i]).filter(cell => cell && cell.tagName === "TD");
    const words = cells.some(cell => !/^\s*([-+−]?[\d.,]+([eE][-+]?\d+)?\s*[%×x]?|nan|inf|-inf|None|—|-|)\s*$/i.test(cell.textContent));
    if (words) [...cells, ...head.map(row => row.cells[i]).filter(Boolean)].forEach(cell => cell.classList.add("text"));
  }
}

// On a phone few words stay in one line, and the table scrolls: else one column of words makes all rows high.
const ONE_LINE = 34; // letters
for (const cell of document.querySelectorAll("table.dataframe tbody :is(td, th)")) {
  if (cell.textContent.trim().length <= (cell.cellIndex ? ONE_LINE : ONE_LINE / 2)) cell.classList.add("line");
}

for (const group of document.querySelectorAll(".wl-clips")) {
  const bar = inStep(group);
  if (bar) group.after(bar);
}

// Of many columns a reader chooses; what does not fit scrolls.
for (const table of document.querySelectorAll("table.dataframe")) {
  const heads = table.tHead ? [...table.tHead.rows[0].cells] : [];
  if (heads.length > 10) {
    const boxes = heads.slice(1).map((head, i) => {
      const box = el("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => [...table.rows].forEach((row) => { if (row.cells[i + 1]) row.cells[i + 1].hidden = !box.checked; }));
      return el("label", {}, box, head.textContent);
    });
    table.parentElement.before(el("details", { className: "columns" }, el("summary", { textContent: `choose among ${heads.length} columns` }), ...boxes));
  }
}
document.querySelectorAll(".rich, .scroll, .code").forEach(edges);
explain(document.querySelector("main"));

// A printed page shows what is folded, except code and messages, on paper's width and in its colours.
const PAPER = 690; // pixels of an A4 page between its margins
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], .source, .messages)")];
  opened.forEach((d) => { d.open = true; });
  document.documentElement.classList.toggle("was-dark", dark.matches);
  places.forEach((p) => { p.style.zoom = Math.min(1, PAPER / Math.max(p.offsetWidth, p.scrollWidth)); });
});
addEventListener("afterprint", () => {
  opened.forEach((d) => { d.open = false; });
  places.forEach((p) => { p.style.zoom = ""; });
});
