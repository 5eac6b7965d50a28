// Two chosen metrics against each other, the runs that no other beats on both joined by a line.
const plot = document.getElementById("frontier");
// Plotly reads some HTML in its texts.
const safe = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const brief = (text, most = 34) => text.length > most ? text.slice(0, most - 1) + "…" : text;
const choices = metrics.filter(c => c.axis);
const range = (key, list) => {
  const edges = ["low", "high"].filter(edge => column[key][edge]).flatMap(edge => list.map(i => table[column[key][edge]][i]));
  const values = [...list.map(i => measured(key, i)), ...edges.filter(v => typeof v === "number")];
  const low = Math.min(...values), high = Math.max(...values);
  // Over a wide range a linear axis would crowd the best together.
  if (low > 0 && high / low > 30) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const digit of [1, 2, 5]) ticks.push(Number(`${digit}e${power}`));
    }
    return { type: "log", range: [Math.log10(low) - 0.1, Math.log10(high) + 0.1], tickmode: "array", tickvals: ticks, ticktext: ticks.map(v => v.toLocaleString("en", { maximumSignificantDigits: 1 })) };
  }
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return { type: "linear", range: [low - room, high + room] };
};
const described = (i) => {
  const lines = [`<b>${safe(runs[i].title)}</b>`];
  for (const key of [state.x, state.y]) {
    const c = column[key], words = against(key, i);
    lines.push(`${safe(c.title)} ${show(c, measured(key, i))} ${safe(c.unit)}${words ? `, ${words}` : ""}`);
  }
  return lines.join("<br>");
};
const within = (key, list) => {
  const { low, high } = column[key];
  if (!low) return undefined;
  const far = (edge, sign) => list.map(i => Math.max(0, sign * (table[edge][i] - measured(key, i))) || 0);
  return { type: "data", symmetric: false, array: far(high, 1), arrayminus: far(low, -1), thickness: 1, width: 0, color: css("--faint") };
};
// Intervals; among many runs, of those that are chosen.
const bars = (list) => {
  const drawn = list.filter(i => runs.length <= 30 || selected.has(i));
  return {
    type: "scatter", mode: "markers", x: drawn.map(i => measured(state.x, i)), y: drawn.map(i => measured(state.y, i)), marker: { opacity: 0, size: 1 },
    error_x: within(state.x, drawn), error_y: within(state.y, drawn), hoverinfo: "skip", showlegend: false, name: "interval",
  };
};
const points = (list, on, more) => ({
  type: "scatter", mode: "markers", x: list.map(i => measured(state.x, i)), y: list.map(i => measured(state.y, i)),
  customdata: list, text: list.map(described), hovertemplate: "%{text}<extra></extra>", ...more,
  marker: {
    symbol: list.map(i => runs[i].baseline ? "diamond" : "circle"),
    size: list.map(i => runs[i].baseline ? 14 : on.has(i) ? 12 : 9),
    color: list.map(tint), opacity: list.map(i => on.has(i) || runs[i].baseline || selected.has(i) ? 1 : 0.6),
    line: { width: list.map(i => selected.has(i) ? 2 : 0), color: css("--ink") },
  },
});

// Names stand where they cover neither a point nor another name; the rest are told by hovering.
const placed = (list, on, all) => {
  const { xaxis, yaxis, _size: size } = plot._fullLayout;
  const [wide, high] = [size.w, size.h];
  const at = i => [xaxis.d2p(measured(state.x, i)), yaxis.d2p(measured(state.y, i))];
  const taken = all.map(at).map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]);
  const found = [];
  const clash = ([a, b, c, d]) => a < 0 || b < -14 || c > wide || d > high || taken.some(([e, f, g, h]) => a < g && c > e && b < h && d > f);
  for (const i of list) {
    const text = brief(runs[i].title), w = text.length * 6.3 + 4, [x, y] = at(i);
    const spots = [["left", 12, 0], ["right", -12, 0], ["left", 9, -11], ["left", 9, 11], ["right", -9, -11], ["right", -9, 11],
      ["center", 0, -18], ["center", 0, 18], ["left", 2, -20], ["left", 2, 20]];
    for (const [anchor, dx, dy] of spots) {
      const left = anchor === "left" ? x + dx : anchor === "right" ? x + dx - w : x - w / 2;
      const box = [left, y + dy - 8, left + w, y + dy + 8];
      if (clash(box)) continue;
      taken.push(box);
      found.push({ x: xaxis.p2l(x), y: yaxis.p2l(y), text: safe(text), showarrow: false,
        xanchor: anchor, xshift: dx, yshift: -dy, bgcolor: css("--page"), borderpad: 0, font: { size: 12, color: css(on.has(i) ? "--ink" : "--soft") } });
      break;
    }
  }
  return found;
};
const drawFrontier = () => {
  const all = every.filter(i => Number.isFinite(measured(state.x, i)) && Number.isFinite(measured(state.y, i)));
  const list = all.filter(i => visible.has(i)), on = efficient(state.x, state.y);
  const joined = list.filter(i => on.has(i)).sort((a, b) => measured(state.x, a) - measured(state.x, b));
  const groups = state.colour ? column[state.colour].few : [null];
  const traces = [{
    type: "scatter", mode: "lines", x: joined.map(i => measured(state.x, i)), y: joined.map(i => measured(state.y, i)),
    line: { color: css("--soft"), width: 1.5 }, hoverinfo: "skip", showlegend: false, name: "frontier",
  }];
  for (const value of groups) {
    const own = value === null ? list : list.filter(i => String(table[state.colour][i]) === String(value));
    if (!own.length) continue;
    traces.push(points(own, on, { name: safe(brief(String(value ?? ""))) }));
  }
  // The legend shows plain dots, whatever its first point looks like.
  const keys = groups.length > 1 ? traces.slice(1).map(trace => ({
    type: "scatter", mode: "markers", x: [null], y: [null], name: trace.name, marker: { size: 9, color: trace.marker.color[0], symbol: "circle" }, hoverinfo: "skip",
  })) : [];
  traces.slice(1).forEach((trace) => { trace.showlegend = false; });
  if (column[state.x].low || column[state.y].low) traces.splice(1, 0, bars(list));
  const axis = key => ({ ...board.layout.xaxis, ...range(key, all.length ? all : every), title: { ...board.layout.xaxis.title,
    text: `${safe(titled(column[key]))}, ${column[key].better === "min" ? "lower" : "higher"} is better` },
    gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--faint"), fixedrange: true, separatethousands: true });
  const layout = {
    ...board.layout, height: narrow() ? 380 : 460, hovermode: "closest", annotations: [],
    font: { ...board.layout.font, color: css("--soft") }, margin: { l: 10, r: 14, t: 30, b: 10 },
    xaxis: axis(state.x), yaxis: axis(state.y), dragmode: false, clickmode: "event",
    hoverlabel: { ...board.layout.hoverlabel, bgcolor: css("--page"), bordercolor: css("--faint"), font: { ...board.layout.hoverlabel.font, color: css("--ink") } },
  };
  const named = [...new Set([...joined, ...list.filter(i => runs[i].baseline), ...list.filter(i => selected.has(i))])].slice(0, 24);
  Plotly.react(plot, [...traces, ...keys], layout, { responsive: true, displaylogo: false, displayModeBar: false })
    .then(() => Plotly.relayout(plot, { annotations: placed(named, on, list) }))
    .then(() => performance.mark("wanlab-drawn"));
};
const axisPick = (which, words) => {
  const select = el("select", {}, ...choices.map(c => el("option", { value: c.key, textContent: c.title, selected: c.key === state[which] })));
  select.addEventListener("change", () => {
    const other = which === "x" ? "y" : "x";
    if (select.value === state[other]) {
      state[other] = state[which];
      document.querySelector(`[data-axis="${other}"]`).value = state[other];
    }
    state[which] = select.value;
    drawFrontier();
    showClips();
  });
  select.dataset.axis = which;
  return el("label", {}, words, select);
};
const startFrontier = () => {
  const colour = el("select", {}, ...coloured.map(c => el("option", { value: c.key, textContent: c.title })));
  colour.addEventListener("change", () => { state.colour = colour.value; drawFrontier(); drawLines(); });
  document.getElementById("picks").append(axisPick("x", "across "), axisPick("y", "up "), ...(coloured.length > 1 ? [el("label", {}, "colour ", colour)] : []));
  drawFrontier();
  plot.on("plotly_click", ({ points: [point] }) => {
    if (typeof point.customdata !== "number") return;
    choose(point.customdata);
    rows[point.customdata].classList.add("flash");
    setTimeout(() => rows[point.customdata].classList.remove("flash"), 1200);
  });
  plot.on("plotly_hover", ({ points: [point] }) => typeof point.customdata === "number" && tell("hover", point.customdata));
  plot.on("plotly_unhover", () => tell("hover", null));
  on("filter", drawFrontier);
  on("select", drawFrontier);
  dark.addEventListener("change", drawFrontier);
  addEventListener("resize", later(drawFrontier));
  const button = el("button", { type: "button", className: "quiet", textContent: "data", title: "download the numbers of this figure as CSV" });
  button.addEventListener("click", () => {
    const list = every.filter(i => visible.has(i) && !Number.isNaN(measured(state.x, i))), on = efficient(state.x, state.y);
    download(`${board.name}-frontier.csv`, [["label", state.x.slice(2), state.y.slice(2), "on_frontier"],
      ...list.map(i => [runs[i].label, measured(state.x, i), measured(state.y, i), on.has(i)])]);
  });
  plot.after(el("p", { className: "under" }, button));
};
