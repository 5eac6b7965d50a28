// Parallel coordinates as SVG: one line per run. On a narrow page the axes lie, and the lines run down.
const lines = document.getElementById("lines");
const svg = (tag, set = {}, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(set)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const later = (run, ms = 150) => { let timer = 0; return () => { clearTimeout(timer); timer = setTimeout(run, ms); }; };
// Places on an axis are from 0 to 1, better at 1.
const scales = () => {
  const list = every.filter(i => runs[i].state === "finished"), found = [];
  for (const c of parameters.slice(0, 5)) {
    const values = [...new Set(list.map(i => table[c.key][i]).filter(v => v !== null))];
    if (values.length < 2) continue;
    const numbers = values.every(v => typeof v === "number");
    if (numbers) values.sort((a, b) => a - b); else if (values.length > 30) continue;
    const at = new Map(values.map((v, k) => [v, numbers && values.length > 12 ? (v - values[0]) / (values.at(-1) - values[0]) : (values.length - 1 - k) / (values.length - 1)]));
    if (numbers && values.length <= 12) values.forEach((v, k) => at.set(v, k / (values.length - 1)));
    const ticks = values.length <= 12 ? values : [values[0], values.at(-1)];
    found.push({ c, at: i => at.get(table[c.key][i]), ticks: ticks.map(v => [at.get(v), String(v)]), words: !numbers });
  }
  // Time, memory, load and quality, each once; then what is left.
  const ranked = metrics.filter(m => m.better), firsts = ranked.filter((m, k) => ranked.findIndex(o => o.about === m.about) === k);
  for (const c of [...firsts, ...ranked.filter(m => !firsts.includes(m))].slice(0, 6).sort((a, b) => ranked.indexOf(a) - ranked.indexOf(b))) {
    const values = list.map(i => measured(c.key, i)).filter(Number.isFinite);
    if (new Set(values).size < 2) continue;
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const log = low > 0 && high / low > 30, of = log ? Math.log10 : v => v;
    const place = v => { const t = (of(v) - of(low)) / (of(high) - of(low)); return c.better === "min" ? 1 - t : t; };
    found.push({ c, at: (i) => { const v = measured(c.key, i); return Number.isFinite(v) ? place(v) : undefined; },
      ticks: [[place(low), show(c, low)], [place(high), show(c, high)]], words: false });
  }
  return found;
};
const known = lines ? scales() : [];
let strokes = [];
const tip = el("div", { className: "tip", hidden: true });
const drawLines = () => {
  if (!lines || known.length < 2) return;
  const down = lines.clientWidth < 640, wide = lines.clientWidth, n = known.length;
  const gap = 74, tall = down ? 58 + (n - 1) * gap : 340;
  const words = k => Math.max(0, ...known[k].ticks.map(([, text]) => Math.min(22, text.length))) * 6.4;
  const [left, right] = down ? [4, wide - 4] : [Math.max(24, Math.min(words(0) + 12, 0.16 * wide)), wide - Math.max(40, words(n - 1) / 2 + 10)];
  const [top, bottom] = [58, tall - 16];
  const spot = (k, t) => down ? [left + t * (right - left), 34 + k * gap] : [left + k * (right - left) / (n - 1), bottom - t * (bottom - top)];
  const picture = svg("svg", { viewBox: `0 0 ${wide} ${tall}`, width: wide, height: tall, role: "img", "aria-label": "parallel coordinates; the table below holds the same numbers" });
  const on = state.x ? efficient(state.x, state.y) : new Set();
  const bundle = svg("g", { class: "bundle" }), hits = svg("g", { class: "hits" });
  strokes = [];
  for (const i of every.filter(i => runs[i].state === "finished" && visible.has(i))) {
    let path = "", pen = "M";
    known.forEach((scale, k) => {
      const t = scale.at(i);
      if (t === undefined) { pen = "M"; return; }
      const [x, y] = spot(k, t);
      if (pen === "M") path += `M${x.toFixed(1)},${y.toFixed(1)}`;
      else {
        const [a, b] = spot(k - 1, known[k - 1].at(i));
        // A gentle S between two axes: lines that cross can be told apart.
        path += down ? `C${a.toFixed(1)},${(b + gap / 2.4).toFixed(1)} ${x.toFixed(1)},${(y - gap / 2.4).toFixed(1)} ${x.toFixed(1)},${y.toFixed(1)}`
          : `C${(a + (x - a) / 2.4).toFixed(1)},${b.toFixed(1)} ${(x - (x - a) / 2.4).toFixed(1)},${y.toFixed(1)} ${x.toFixed(1)},${y.toFixed(1)}`;
      }
      pen = "L";
    });
    const line = svg("path", { d: path, stroke: tint(i), class: [on.has(i) ? "front" : "", runs[i].baseline ? "base" : "", selected.has(i) ? "chosen" : ""].join(" ") });
    bundle.append(line);
    strokes[i] = line;
    const hit = svg("path", { d: path });
    hit.addEventListener("pointerenter", event => { tell("hover", i); tipAt(event, i); });
    hit.addEventListener("pointermove", event => tipAt(event, i));
    hit.addEventListener("pointerleave", () => { tell("hover", null); tip.hidden = true; });
    hit.addEventListener("click", () => choose(i));
    hits.append(hit);
  }
  const frame = svg("g", { class: "frame" });
  known.forEach((scale, k) => {
    const [x0, y0] = spot(k, 0), [x1, y1] = spot(k, 1), last = k === n - 1;
    frame.append(svg("line", { x1: x0, y1: y0, x2: x1, y2: y1 }));
    const most = Math.max(6, Math.floor((down ? wide * 0.9 : (right - left) / (n - 1)) / 7.2));
    const [tx, ty] = down ? [left, y0 - 12] : [x0, 12];
    const anchor = down ? "start" : k === 0 ? "start" : last ? "end" : "middle";
    const shift = down ? 0 : k === 0 ? -x0 + 2 : last ? wide - x0 - 2 : 0;
    frame.append(svg("text", { x: tx + shift, y: ty, class: "title", "text-anchor": anchor }, brief(down ? titled(scale.c) : scale.c.title, most)));
    if (!down && scale.c.unit) frame.append(svg("text", { x: tx + shift, y: 27, class: "unit", "text-anchor": anchor }, scale.c.unit));
    const room = Math.floor((right - left) / Math.max(1, scale.ticks.length) / 6);
    scale.ticks.forEach(([t, text], j) => {
      const [x, y] = spot(k, t);
      if (down) {
        const side = t < 0.02 ? "start" : t > 0.98 ? "end" : "middle";
        frame.append(svg("text", { x, y: y + 15, "text-anchor": side, class: "tick" }, brief(text, Math.max(3, room))));
      } else if (scale.words) {
        frame.append(svg("text", { x: k === 0 ? x - 8 : x + 8, y: y + 4, "text-anchor": k === 0 ? "end" : "start", class: "tick" }, brief(text, 22)));
      } else {
        frame.append(svg("text", { x: k === 0 ? x - 8 : x + 7, y: y + (t > 0.5 ? -3 : 11) * (scale.ticks.length === 2) + 4 * (scale.ticks.length !== 2), "text-anchor": k === 0 ? "end" : "start", class: "tick" }, text));
      }
    });
  });
  picture.append(bundle, frame, hits);
  lines.replaceChildren(picture, tip);
  document.getElementById("better").textContent = down ? "on the right" : "at the top";
};
const tipAt = (event, i) => {
  const box = lines.getBoundingClientRect();
  tip.replaceChildren(el("b", { textContent: runs[i].title }),
    ...known.filter(({ c }) => c.kind === "metric").map(({ c }) => el("span", { textContent: `${c.title} ${show(c, measured(c.key, i))} ${c.unit}` })));
  tip.hidden = false;
  const x = Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4);
  tip.style.left = `${Math.max(0, x)}px`;
  tip.style.top = `${event.clientY - box.top + 16}px`;
};
let over = null;
on("hover", (i) => {
  if (over !== null && strokes[over]) strokes[over].classList.remove("over");
  over = i;
  lines?.classList.toggle("hovering", i !== null && !!strokes[i]);
  if (i !== null && strokes[i]) strokes[i].classList.add("over");
});
