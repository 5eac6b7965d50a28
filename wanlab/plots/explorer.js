// The explorer: lanes of a trace and views that follow what is selected in them. One file for two places: anywidget loads it in
// Jupyter (`export default` at the end), and a report has it as a script with its data. Layout of the data: diagnose/explorer/pack.py.

// ---- data -------------------------------------------------------------------------------------------------------------------

async function unpacked(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const WIDTHS = { uint8: 1, uint16: 2, uint32: 4 };

function decode(bytes) {
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  let at = Math.ceil((4 + length) / 8) * 8;
  for (const trace of header.traces) {
    const column = {};
    for (const { name, type, count, delta } of trace.columns) {
      const width = WIDTHS[type], to = width === 1 ? new Uint8Array(count) : width === 2 ? new Uint16Array(count) : new Uint32Array(count);
      for (let plane = 0; plane < width; plane++) {
        const shift = 8 * plane, from = at + plane * count;
        for (let i = 0; i < count; i++) to[i] |= bytes[from + i] << shift;
      }
      if (delta) for (let i = 1; i < count; i++) to[i] += to[i - 1];
      at += width * count;
      column[name] = to;
    }
    trace.column = column;
  }
  return header;
}

const microseconds = (low, high) => {
  const all = new Float64Array(low.length);
  for (let i = 0; i < all.length; i++) all[i] = (low[i] + high[i] * 2 ** 32) / 1e3;
  return all;
};

// One trace with what is derived from its columns: ends, own times, nodes of the flame graph.
class Trace {
  constructor(header, colours) {
    Object.assign(this, header);
    const c = header.column, n = this.rows;
    Object.assign(this, { name: c.name, module: c.module, shapes: c.shapes, kind: c.kind, component: c.component, category: c.category });
    this.start = microseconds(c.start_low, c.start_high);
    this.time = microseconds(c.time_low, c.time_high);
    this.parent = new Int32Array(n);
    this.step = new Int16Array(n);
    for (let i = 0; i < n; i++) { this.parent[i] = c.parent[i] - 1; this.step[i] = c.step[i] - 1; }
    const float = column => new Float32Array(column.buffer, column.byteOffset, column.length);
    this.flop = float(c.flop); this.bytes = float(c.bytes); this.roofline = float(c.roofline);
    const stretch = microseconds(c.stretch_start_low, c.stretch_start_high);
    this.stretches = { start: stretch, time: microseconds(c.stretch_time_low, c.stretch_time_high),
      category: c.stretch_category, component: c.stretch_component, step: Int16Array.from(c.stretch_step, s => s - 1) };
    this.hosts = this.lanes.filter(lane => lane.side === "host").reduce((all, lane) => Math.max(all, lane.last), 0);
    // Ends no later than that of the host event around, and own times without what is inside.
    this.end = new Float64Array(n);
    this.own = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      const up = i < this.hosts ? this.parent[i] : -1;
      this.end[i] = this.start[i] + this.time[i];
      if (up >= 0) this.end[i] = Math.max(Math.min(this.end[i], this.end[up]), this.start[i]);
      this.own[i] = this.end[i] - this.start[i];
      if (up >= 0) this.own[up] -= this.own[i];
    }
    const range = this.words.kind.indexOf("user_annotation");
    const paints = this.categories.length;
    this.paint = new Uint8Array(n); // a colour: of the category, of a range that of its component
    for (let i = 0; i < n; i++) this.paint[i] = this.kind[i] === range ? paints + this.component[i] : this.category[i];
    this.parts = this.words.module.map(part);
    this.inside = new Float64Array(n);
    this.range = range;
  }

  // Nodes of the flame graph, those of all layers together; made when it is first drawn.
  get tree() {
    if (this.nodes) return this.nodes;
    const names = [], ids = new Map(), of = this.words.name.map(name => {
      const text = part(name);
      if (!ids.has(text)) { ids.set(text, names.length); names.push(text); }
      return ids.get(text);
    });
    const skipped = Uint8Array.from(this.words.name, name => /^ProfilerStep#/.test(name) ? 1 : 0);
    const parent = [-1], name = [-1], depth = [0], keys = new Map(), node = new Int32Array(this.rows), wide = names.length;
    for (let i = 0; i < this.rows; i++) {
      let up = this.parent[i];
      if (i >= this.hosts && up >= 0) up = this.parent[up]; // the call that launched a kernel is left out
      const above = up < 0 ? 0 : node[up];
      if (skipped[this.name[i]]) { node[i] = above; continue; }
      const key = above * wide + of[this.name[i]];
      let mine = keys.get(key);
      if (mine === undefined) {
        mine = parent.length;
        keys.set(key, mine);
        parent.push(above); name.push(of[this.name[i]]); depth.push(depth[above] + 1);
      }
      node[i] = mine;
    }
    const first = new Int32Array(parent.length).fill(-1);
    for (let i = this.rows - 1; i >= 0; i--) first[node[i]] = i;
    return (this.nodes = { names, parent, name, depth, node, first });
  }
}

// A path with * for numbers of layers: "expert_low.blocks.*.attn1".
const part = name => name.includes("::") ? name : name.replace(/\.\d+(?=\.|$)/g, ".*");
const short = (name, most = 60) => {
  let text = name.replace(/^void /, "").replace(/\(anonymous namespace\)::/g, "");
  const functor = text.match(/(\w*(?:Functor|Op|_kernel_cuda|_cuda_kernel)\w*)[<>(),]/);
  const base = text.replace(/[<(].*$/s, "").replace(/^at::native::/, "");
  text = functor && functor[1] !== base && !base.includes(functor[1]) ? `${base} ${functor[1]}` : base || text;
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
};
const time = us => us >= 1e6 ? `${digits(us / 1e6)} s` : us >= 1e3 ? `${digits(us / 1e3)} ms` : us >= 1 || us === 0 ? `${digits(us)} µs` : `${digits(us * 1e3)} ns`;
const digits = (value) => {
  if (!isFinite(value)) return "–";
  const size = Math.abs(value);
  return size >= 100 ? Math.round(value).toLocaleString("en") : size >= 10 ? value.toFixed(1) : size >= 1 ? value.toFixed(2) : size >= 0.001 ? value.toPrecision(2) : size ? "< 0.001" : "0";
};
const percent = share => share > 0 && share < 1e-4 ? "< 0.01 %" : `${digits(100 * share)} %`;
const count = value => value.toLocaleString("en");
const el = (tag, set = {}, ...children) => {
  const { data, ...rest } = set, made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data);
  made.append(...children.filter(child => child !== null));
  return made;
};
// First i of sorted values[low..high) with values[i] >= x.
const lower = (values, x, low = 0, high = values.length) => {
  while (low < high) { const mid = (low + high) >> 1; if (values[mid] < x) low = mid + 1; else high = mid; }
  return low;
};

// ---- rows of the timeline: sorted spans, of which a pixel shows the longest ----------------------------------------------------

const BLOCK = 32;

class Row {
  // ids: events of `trace` (or positions of stretches); paint: colour of a span; text: its label.
  constructor(trace, label, start, end, ids, paint, text, event) {
    Object.assign(this, { trace, label, key: label, start, end, ids, paint, text, event });
    const n = start.length;
    this.sums = new Float64Array(n + 1);
    for (let i = 0; i < n; i++) this.sums[i + 1] = this.sums[i] + end[i] - start[i];
    this.longest = new Int32Array(Math.ceil(n / BLOCK));
    for (let block = 0; block < this.longest.length; block++) this.longest[block] = this.scan(block * BLOCK, Math.min(n, (block + 1) * BLOCK));
  }
  scan(from, to) {
    let best = from;
    for (let i = from + 1; i < to; i++) if (this.end[i] - this.start[i] > this.end[best] - this.start[best]) best = i;
    return best;
  }
  most(from, to) {
    if (to - from < 3 * BLOCK) return this.scan(from, to);
    const first = Math.ceil(from / BLOCK), last = Math.floor(to / BLOCK);
    let best = this.scan(from, first * BLOCK || from + 1);
    const stride = Math.max(1, (last - first) >> 6); // at most 64 or so of many blocks are looked at
    for (let block = first; block < last; block += stride) {
      const i = this.longest[block];
      if (this.end[i] - this.start[i] > this.end[best] - this.start[best]) best = i;
    }
    return best;
  }
  at(moment) {
    const i = lower(this.start, moment);
    const place = i < this.start.length && this.start[i] === moment ? i : i - 1;
    return place >= 0 && this.end[place] > moment ? place : -1;
  }
}

function rowsOf(trace) {
  const { stretches: s } = trace, rows = [], n = s.start.length;
  const joined = (label, same, paint, text) => {
    const first = [];
    for (let i = 0; i < n; i++) if (!i || !same(i, i - 1)) first.push(i);
    const ids = Int32Array.from(first), start = Float64Array.from(first, i => s.start[i]), end = new Float64Array(first.length);
    for (let k = 0; k < first.length; k++) { const last = (k + 1 < first.length ? first[k + 1] : n) - 1; end[k] = s.start[last] + s.time[last]; }
    rows.push(new Row(trace, label, start, end, ids, paint, text, false));
  };
  const paints = trace.categories.length;
  joined("step", (i, j) => s.step[i] === s.step[j], i => paints + trace.components.length + (s.step[i] & 1), i => s.step[i] < 0 ? "" : `step ${s.step[i]}`);
  joined("component", (i, j) => s.component[i] === s.component[j], i => paints + s.component[i], i => trace.components[s.component[i]][1]);
  joined("wall clock", () => false, i => s.category[i], i => trace.categories[s.category[i]][1]);
  // Modules in the order in which their kernels run, on the stream with the most of them.
  const most = trace.lanes.filter(lane => lane.side === "gpu").sort((one, other) => other.last - other.first - one.last + one.first)[0];
  if (most && trace.words.module.length > 1) {
    const first = [];
    for (let i = most.first; i < most.last; i++) if (i === most.first || trace.module[i] !== trace.module[i - 1] || trace.step[i] !== trace.step[i - 1]) first.push(i);
    const last = first.map((_, k) => (k + 1 < first.length ? first[k + 1] : most.last) - 1);
    rows.push(Object.assign(new Row(trace, "module", Float64Array.from(first, i => trace.start[i]), Float64Array.from(last, i => trace.end[i]), Int32Array.from(first),
      i => paints + trace.component[i], i => trace.words.module[trace.module[i]].replace(/^[^.]*\./, ""), true), { module: true }));
  }
  const lanes = [...trace.lanes].sort((one, other) => (one.side === "gpu" ? 0 : 1) - (other.side === "gpu" ? 0 : 1));
  for (const lane of lanes) {
    const depth = new Int16Array(lane.last - lane.first), counts = new Int32Array(lane.depth);
    for (let i = lane.first; i < lane.last; i++) {
      const up = lane.side === "host" ? trace.parent[i] : -1;
      counts[depth[i - lane.first] = up < 0 ? 0 : depth[up - lane.first] + 1]++;
    }
    for (let level = 0; level < lane.depth; level++) {
      const ids = new Int32Array(counts[level]);
      for (let i = lane.first, k = 0; i < lane.last; i++) if (depth[i - lane.first] === level) ids[k++] = i;
      rows.push(new Row(trace, level ? "" : lane.name, Float64Array.from(ids, i => trace.start[i]), Float64Array.from(ids, i => trace.end[i]), ids,
        i => trace.paint[i], i => trace.words.name[trace.name[i]], true));
      rows.at(-1).host = lane.side === "host";
    }
  }
  return rows;
}

// Rows of two traces: the second's below those of the first that are the same, threads of its host at the end.
function paired(rows, others) {
  const left = others.filter(row => !row.host), all = [];
  for (const row of others) { row.second = true; row.label = row.label && (row.host ? `second, ${row.label}` : "second"); }
  for (const row of rows) {
    all.push(row);
    if (!row.host && left.length) all.push(left.shift());
  }
  const host = all.findIndex(row => row.host);
  all.splice(host < 0 ? all.length : host, 0, ...left);
  return [...all, ...others.filter(row => row.host)];
}

// From moments of one trace to those of another: at the first work of each module in each step, between them in proportion.
class Alignment {
  constructor(trace, other, shared) {
    const [ours, theirs] = [trace, other].map(each => this.firsts(each, shared)), pairs = [];
    for (const [place, at] of ours) if (theirs.has(place)) pairs.push([at, theirs.get(place)]);
    pairs.sort((one, two) => one[0] - two[0]);
    const kept = Alignment.rising(pairs.map(pair => pair[1])).map(i => pairs[i]);
    this.from = Float64Array.from(kept, pair => pair[0]);
    this.to = Float64Array.from(kept, pair => pair[1]);
    if (!kept.length) { this.from = Float64Array.of(trace.window_us[0]); this.to = Float64Array.of(other.window_us[0]); }
  }
  firsts(trace, shared) {
    const found = new Map(), names = trace.words.module.map(shared), wide = names.length, seen = new Set();
    for (const lane of trace.lanes) if (lane.side === trace.side) for (let i = lane.first; i < lane.last; i++) {
      const key = (trace.step[i] + 1) * wide + trace.module[i];
      if (seen.has(key)) continue; // a lane is in order of time
      seen.add(key);
      const place = `${trace.step[i]}\n${names[trace.module[i]]}`;
      found.set(place, Math.min(found.get(place) ?? Infinity, trace.start[i]));
    }
    return found;
  }
  // Positions of a longest rising part of some values.
  static rising(values) {
    const ends = [], before = new Int32Array(values.length);
    values.forEach((value, i) => {
      let low = 0, high = ends.length;
      while (low < high) { const mid = (low + high) >> 1; if (values[ends[mid]] < value) low = mid + 1; else high = mid; }
      before[i] = low ? ends[low - 1] : -1;
      ends[low] = i;
    });
    const chain = [];
    for (let i = ends.at(-1) ?? -1; i >= 0; i = before[i]) chain.push(i);
    return chain.reverse();
  }
  at(moment) {
    const { from, to } = this, next = lower(from, moment), n = from.length;
    if (next < n && from[next] === moment) return to[next];
    if (next === 0) return to[0] + moment - from[0];
    if (next === n) return to[n - 1] + moment - from[n - 1];
    return to[next - 1] + (moment - from[next - 1]) * (to[next] - to[next - 1]) / (from[next] - from[next - 1]);
  }
}

// ---- the view ---------------------------------------------------------------------------------------------------------------

const ROW = 17, HIGH = 14, GUTTER = 104, AXIS = 20, LEVELS = 6;
const FILTERS = ["between", "component", "step", "category", "module", "name", "search", "side"];

class Explorer {
  constructor(root, data, state, changed) {
    const begin = performance.now();
    this.root = root;
    this.changed = changed;
    this.data = data;
    [this.trace, this.other] = data.traces.map(trace => new Trace(trace));
    this.rows = rowsOf(this.trace);
    [this.low, this.high] = [Math.min(this.trace.window_us[0], this.rows[0].start[0] ?? 0), this.trace.window_us[1]];
    if (this.other) {
      // A module that one trace does not name, as inside a compiled block, counts as the nearest one around it that both name.
      const theirs = new Set(this.other.words.module), both = new Set(this.trace.words.module.filter(name => theirs.has(name)));
      this.shared = (module) => { while (module && !both.has(module)) module = module.slice(0, Math.max(module.lastIndexOf("."), 0)); return module; };
      this.aligned = new Alignment(this.trace, this.other, this.shared);
      this.rows = paired(this.rows, rowsOf(this.other));
      this.high = Math.max(this.high, this.low + this.other.window_us[1] - this.other.window_us[0]);
    }
    this.view = [this.low, this.high];
    this.state = { side: this.trace.side, ...state };
    if (this.state.view) this.view = this.state.view;
    this.measured = { frames: [], select: [] };
    this.build();
    this.recolour();
    this.select();
    this.draw();
    this.measured.open = performance.now() - begin;
    root.dataset.drawn = "yes";
  }

  build() {
    const { root } = this;
    root.classList.add("wlx");
    root.replaceChildren();
    this.search = el("input", { type: "search", placeholder: "search names, modules, shapes", ariaLabel: "search", value: this.state.search ?? "" });
    this.chips = el("span", { className: "wlx-chips" });
    this.said = el("span", { className: "wlx-said", role: "status" });
    const sides = el("span", { className: "wlx-sides" }, ...["gpu", "host"].filter(side => this.trace.lanes.some(lane => lane.side === side)).map(side =>
      el("button", { type: "button", textContent: side === "gpu" ? "GPU" : "host", data: { side }, onclick: () => this.set({ side, name: undefined }) })));
    const zoom = el("span", { className: "wlx-sides" }, ...[["−", 2, "zoom out"], ["+", 0.5, "zoom in"]].map(([textContent, by, title]) =>
      el("button", { type: "button", textContent, title, ariaLabel: title, onclick: () => this.zoom(by) })),
      el("button", { type: "button", textContent: "all", title: "show all (0)", onclick: () => this.move(this.low, this.high) }));
    this.moves = matchMedia("(pointer: coarse)").matches; // what a drag does
    const drags = el("span", { className: "wlx-sides" }, ...[["select", false], ["move", true]].map(([textContent, moves]) =>
      el("button", { type: "button", textContent, title: `a drag ${textContent}s`, data: { moves }, onclick: () => { this.moves = moves; this.panels(); } })));
    this.canvas = el("canvas", { tabIndex: 0, ariaLabel: "timeline: drag to select, W and S zoom, A and D move" });
    this.spacer = el("div", { className: "wlx-spacer" });
    this.box = el("div", { className: "wlx-lanes edge" }, this.canvas, this.spacer);
    this.tip = el("div", { className: "wlx-tip", hidden: true });
    const panel = (title, name, ...more) => (this[name] = el("div", { className: `wlx-body wlx-${name}` }),
      el("section", { className: `wlx-panel wlx-of-${name}` }, el("h4", {}, title, ...more), this[name]));
    this.beside = el("span", { className: "wlx-beside" });
    root.append(
      el("div", { className: "wlx-bar" }, this.search, sides, zoom, drags, this.said, this.chips), this.box,
      el("p", { className: "wlx-help", textContent: "Drag: select a stretch. W, S or wheel: zoom. A, D: move. Click an event: all its calls. F: zoom to the selection, 0: all, Esc: select everything." }),
      el("div", { className: "wlx-panels" },
        panel("Wall clock", "bars"), panel("Kernels", "table", " ", this.beside), panel("Calls", "calls"), panel("Roofline", "roof"),
        panel("Flame graph", "flame"), ...(this.other ? [panel("What grew and what shrank", "grew")] : [])), this.tip);
    this.root.querySelector(".wlx-of-table h4").firstChild.textContent = this.trace.side === "gpu" ? "Kernels" : "Operators";
    for (const name of ["calls", "roof", "flame"]) this[`${name}Canvas`] = el("canvas");
    this.roof.append(this.roofCanvas);
    this.flame.append(this.flameCanvas);
    this.high_px = this.rows.length * ROW + AXIS + 4;
    this.search.addEventListener("input", () => this.set({ search: this.search.value.trim() || undefined }));
    this.listen();
    let wide = root.clientWidth;
    new ResizeObserver(() => { if (root.clientWidth !== wide) { wide = root.clientWidth; this.invalidate(); this.panels(); } }).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.recolour(); this.invalidate(); this.panels(); });
  }

  // Colours of the page; a canvas does not know of CSS.
  recolour() {
    const style = getComputedStyle(this.root), css = name => style.getPropertyValue(`--wlx-${name}`).trim();
    this.ink = css("ink"); this.soft = css("soft"); this.line = css("line"); this.accent = css("accent"); this.page = css("page");
    const probe = el("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    const rgb = colour => { probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1); return [...probe.getImageData(0, 0, 1, 1).data]; };
    const back = rgb(this.page || "#fff"), { categories, components } = this.data.colours;
    this.names = [...this.trace.categories.map(([name]) => categories[name]), ...this.trace.components.map(([name]) => components[name] ?? "#9aa3ad"), this.line, css("step")];
    this.texts = this.names.map(rgb).map(([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 135 ? "#14181d" : "#ffffff");
    // For every colour LEVELS shades, from almost the page to the whole colour; and one for what is not selected.
    this.shades = new Uint32Array(this.names.length * LEVELS);
    this.names.map(rgb).forEach((colour, paint) => {
      for (let level = 0; level < LEVELS; level++) {
        const share = level === 0 ? 0.16 : 0.3 + 0.7 * level / (LEVELS - 1);
        const [r, g, b] = [0, 1, 2].map(k => Math.round(back[k] + (colour[k] - back[k]) * share));
        this.shades[paint * LEVELS + level] = 0xff000000 | (b << 16) | (g << 8) | r;
      }
    });
    this.ground = 0xff000000 | (back[2] << 16) | (back[1] << 8) | back[0];
  }

  // ---- state

  set(change) {
    this.state = { ...this.state, ...change };
    for (const key of Object.keys(this.state)) if (this.state[key] === undefined || this.state[key] === null) delete this.state[key];
    this.select();
    this.invalidate();
    this.changed(this.state);
  }

  // Everything that follows the selection, in one pass over the events of the chosen side.
  select() {
    const begin = performance.now(), { trace, state } = this;
    this.lit = this.marks(trace, state);
    this.otherLit = this.other ? this.marks(this.other, state) : null;
    this.sums = this.summed(trace, state, state.between);
    this.panels();
    this.measured.select.push(performance.now() - begin);
  }

  // Values of a word list that a search or module is about, as marks.
  filters(trace, state) {
    const text = state.search?.toLowerCase();
    const has = words => text ? Uint8Array.from(words, word => word.toLowerCase().includes(text) ? 1 : 0) : null;
    const index = (pairs, value) => value === undefined ? -1 : pairs.findIndex(([name]) => name === value);
    return {
      component: index(trace.components, state.component), category: index(trace.categories, state.category), step: state.step ?? -2,
      name: state.name === undefined ? -1 : trace.words.name.indexOf(state.name),
      named: state.name !== undefined,
      module: state.module === undefined ? null : Uint8Array.from(trace.parts, name => name === state.module || name.startsWith(`${state.module}.`) ? 1 : 0),
      found: text ? { name: has(trace.words.name), module: has(trace.words.module), shapes: has(trace.words.shapes) } : null,
    };
  }

  // Which events meet the conditions, 1 or 0; null where all do. The time is not one of them: it is drawn as a band.
  marks(trace, state) {
    const f = this.filters(trace, state);
    if (f.component < 0 && f.category < 0 && f.step < -1 && !f.named && !f.module && !f.found) return null;
    const lit = new Uint8Array(trace.rows);
    for (let i = 0; i < trace.rows; i++) {
      lit[i] = (f.component < 0 || trace.component[i] === f.component) && (f.category < 0 || trace.category[i] === f.category) &&
        (f.step < -1 || trace.step[i] === f.step) && (!f.named || trace.name[i] === f.name) && (!f.module || f.module[trace.module[i]]) &&
        (!f.found || f.found.name[trace.name[i]] || f.found.module[trace.module[i]] || f.found.shapes[trace.shapes[i]]) ? 1 : 0;
    }
    return lit;
  }

  // First and last event of a lane that can lie between two moments.
  within(trace, lane, [a, b]) {
    let first = lower(trace.start, a, lane.first, lane.last);
    const last = lower(trace.start, b, first, lane.last);
    if (lane.side === "host") { if (first > lane.first) { first--; while (trace.parent[first] >= 0) first = trace.parent[first]; } }
    else while (first > lane.first && trace.end[first - 1] > a) first--;
    return [first, last];
  }

  summed(trace, state, between) {
    const f = this.filters(trace, state), words = trace.words.name.length, { inside } = trace;
    const sums = { time: new Float64Array(words), calls: new Uint32Array(words), flop: new Float64Array(words), bytes: new Float64Array(words), whole: new Float64Array(words), longest: new Float64Array(words),
      roofline: new Float64Array(words), known: new Float64Array(words), category: new Uint8Array(words),
      hit: new Uint8Array(words), all: 0, chosen: 0, chosenCalls: 0, found: 0, foundCalls: 0, picked: [], shares: new Float64Array(trace.categories.length) };
    const tree = trace.tree;
    sums.nodes = new Float64Array(tree.parent.length);
    for (const lane of trace.lanes) {
      if (lane.side !== state.side) continue;
      const [first, last] = between ? this.within(trace, lane, between) : [lane.first, lane.last];
      const [a, b] = between ?? [-Infinity, Infinity], host = lane.side === "host";
      if (between) for (let i = first; i < last; i++) {
        const spent = Math.max(Math.min(trace.end[i], b) - Math.max(trace.start[i], a), 0);
        inside[i] = spent;
        if (host && trace.parent[i] >= first) inside[trace.parent[i]] -= spent;
      }
      for (let i = first; i < last; i++) {
        if (between && trace.end[i] <= a) continue;
        const own = between ? inside[i] : trace.own[i];
        if ((f.component >= 0 && trace.component[i] !== f.component) || (f.step >= -1 && trace.step[i] !== f.step) || (f.module && !f.module[trace.module[i]])) continue;
        if (f.named && trace.name[i] === f.name && (f.category < 0 || trace.category[i] === f.category)) sums.shares[trace.category[i]] += own;
        if (f.category >= 0 && trace.category[i] !== f.category) continue;
        const name = trace.name[i];
        sums.time[name] += own;
        sums.calls[name]++;
        sums.all += own;
        if (!between || (trace.start[i] >= a && trace.end[i] <= b)) { // a call that is cut has all of its work but not its time
          sums.whole[name] += own;
          sums.flop[name] += trace.flop[i];
          sums.bytes[name] += trace.bytes[i];
          if (trace.roofline[i] > 0) { sums.roofline[name] += trace.roofline[i]; sums.known[name] += own; }
        }
        if (own >= sums.longest[name]) { sums.longest[name] = own; sums.category[name] = trace.category[i]; } // its colour
        const hit = f.found ? f.found.name[name] || f.found.module[trace.module[i]] || f.found.shapes[trace.shapes[i]] : 0;
        if (hit) { sums.hit[name] = 1; sums.found += own; sums.foundCalls++; }
        if (f.named && name !== f.name) continue;
        if (f.named) sums.picked.push(i);
        sums.chosen += own;
        sums.chosenCalls++;
        sums.nodes[tree.node[i]] += own;
      }
    }
    for (let node = tree.parent.length - 1; node > 0; node--) sums.nodes[tree.parent[node]] += sums.nodes[node];
    return sums;
  }

  // ---- views that follow

  panels() {
    if (!this.sums) return;
    this.widths = new Map(["calls", "roof", "flame"].map(name => [this[`${name}Canvas`], Math.max(this[name].clientWidth, 50)])); // before anything is changed
    const { state, sums } = this;
    if (document.activeElement !== this.search) this.search.value = state.search ?? "";
    this.chips.replaceChildren(...FILTERS.filter(key => state[key] !== undefined && key !== "side" && key !== "search").map(key =>
      el("button", { type: "button", title: "remove", onclick: () => this.set({ [key]: undefined }) }, this.chip(key, state[key]), " ×")));
    this.said.textContent = `${count(sums.chosenCalls)} events, ${time(sums.chosen)}` +
      (state.search ? `; found ${count(sums.foundCalls)}, ${time(sums.found)}` : "") +
      (this.other && state.between ? `; ${time(state.between[1] - state.between[0])}, the same in the second trace ${time(this.aligned.at(state.between[1]) - this.aligned.at(state.between[0]))}` : "");
    for (const button of this.root.querySelectorAll("[data-moves]")) button.setAttribute("aria-pressed", String(button.dataset.moves === String(this.moves)));
    for (const button of this.root.querySelectorAll("[data-side]")) button.setAttribute("aria-pressed", String(button.dataset.side === state.side));
    this.drawBars();
    this.drawTable();
    this.drawCalls();
    this.drawRoof();
    this.drawFlame();
    if (this.other) this.drawGrew();
  }

  chip(key, value) {
    if (key === "between") return `${time(value[0] - this.low)} to ${time(value[1] - this.low)}, ${time(value[1] - value[0])}`;
    const pairs = { component: this.trace.components, category: this.trace.categories }[key];
    return pairs ? pairs.find(([name]) => name === value)?.[1] ?? value : key === "step" ? `step ${value}` : short(String(value), 40);
  }

  // The wall clock by category; the rows add up to the selected stretch, less what conditions leave out.
  drawBars() {
    const { trace, state } = this, s = trace.stretches, [a, b] = state.between ?? [-Infinity, Infinity], f = this.filters(trace, state);
    const sums = new Float64Array(trace.categories.length);
    let whole = 0;
    const first = Math.max(lower(s.start, a) - 1, 0);
    for (let i = first; i < s.start.length && s.start[i] < b; i++) {
      const spent = Math.min(s.start[i] + s.time[i], b) - Math.max(s.start[i], a);
      if (spent <= 0 || (f.component >= 0 && s.component[i] !== f.component) || (f.step >= -1 && s.step[i] !== f.step)) continue;
      sums[s.category[i]] += spent;
      whole += spent;
    }
    const order = [...sums.keys()].filter(i => sums[i] > 0).sort((i, j) => sums[j] - sums[i]), most = sums[order[0]] || 1;
    this.bars.replaceChildren(...order.map((i) => {
      const [name, words] = trace.categories[i], on = state.category === name, bound = whole / (whole - sums[i]);
      return el("button", { type: "button", className: `wlx-row${on ? " on" : state.category ? " off" : ""}`, title: `at most ${digits(bound)}× as fast without it`,
        onclick: () => this.set({ category: on ? undefined : name }) },
      el("span", { textContent: words }), el("span", { className: "wlx-track" }, this.fill(sums[i] / most, this.names[i])),
      el("span", { className: "wlx-number", textContent: time(sums[i]) }), el("span", { className: "wlx-number", textContent: percent(sums[i] / whole) }));
    }));
    this.wall = { whole, sums };
  }

  fill(share, colour) {
    const made = el("i");
    made.style.width = `${100 * share}%`;
    made.style.background = colour;
    return made;
  }

  drawTable() {
    const { trace, sums, state } = this;
    const order = [...sums.time.keys()].filter(i => sums.time[i] > 0).sort((i, j) => (sums.hit[j] - sums.hit[i]) || sums.time[j] - sums.time[i]);
    const shown = order.slice(0, 40);
    this.beside.textContent = `${count(order.length)} names, ${time(sums.all)}`;
    const heads = ["", "own time", "share", "calls", "TFLOP/s", "GB/s", "of roofline"];
    const rows = shown.map((i) => {
      const name = trace.words.name[i], on = state.name === name, spent = sums.time[i];
      const swatch = el("i", { className: "wlx-swatch" });
      swatch.style.background = this.names[sums.category[i]];
      const row = el("tr", { className: `${on ? "on" : state.name ? "off" : ""}${sums.hit[i] ? " hit" : ""}`, tabIndex: 0, title: name },
        el("td", { className: "text" }, el("span", { className: "wlx-cell" }, swatch, el("code", { textContent: short(name, 52) }))), ...[time(spent), percent(spent / sums.all), count(sums.calls[i]),
          sums.flop[i] ? digits(sums.flop[i] / sums.whole[i] / 1e6) : "", sums.bytes[i] ? digits(sums.bytes[i] / sums.whole[i] / 1e3) : "",
          sums.known[i] ? percent(sums.roofline[i] / sums.known[i]) : ""].map(textContent => el("td", { textContent })));
      const pick = () => this.set({ name: on ? undefined : name });
      row.addEventListener("click", pick);
      row.addEventListener("keydown", event => event.key === "Enter" && pick());
      return row;
    });
    this.table.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...heads.map(textContent => el("th", { textContent })))), el("tbody", {}, ...rows)),
      order.length > shown.length ? el("p", { className: "wlx-note", textContent: `and ${count(order.length - shown.length)} more with less time` }) : "");
  }

  // All calls of the chosen name: a histogram of their times, their shapes and modules.
  drawCalls() {
    const { trace, state, sums } = this, { picked } = sums;
    if (state.name === undefined || !picked.length) {
      this.calls.replaceChildren(el("p", { className: "wlx-note", textContent: state.name === undefined ? "Click an event, or a row of the table: all its calls, their shapes and modules stand here." : "It does not run in what is selected." }));
      return;
    }
    const times = Float64Array.from(picked, i => trace.time[i]).sort(), groups = key => {
      const all = new Map();
      for (const i of picked) { const of = all.get(trace[key][i]) ?? [0, 0]; of[0] += trace.time[i]; of[1]++; all.set(trace[key][i], of); }
      return [...all].sort((one, other) => other[1][0] - one[1][0]);
    };
    const list = (title, key, words, text = word => word) => el("div", {}, el("h5", { textContent: title }), el("table", {}, el("tbody", {}, ...groups(key).slice(0, 6).map(([id, [spent, calls]]) =>
      el("tr", {}, el("td", { className: "text" }, el("code", { textContent: text(words[id]) || "(not recorded)" })), el("td", { textContent: `${count(calls)}×` }), el("td", { textContent: time(spent) }))))));
    this.calls.replaceChildren(el("p", { className: "wlx-name" }, el("code", { textContent: state.name.slice(0, 300) })),
      el("p", { className: "wlx-note", textContent: `${count(times.length)} calls: median ${time(times[times.length >> 1])}, shortest ${time(times[0])}, longest ${time(times[times.length - 1])}` }),
      this.callsCanvas, list("shapes", "shapes", trace.words.shapes), list("modules", "module", trace.words.module), this.origin(picked.includes(this.picked) ? this.picked : picked[0]));
    const [g, width, height] = this.sized(this.callsCanvas, 90), low = Math.log(Math.max(times[0], 0.1)), high = Math.max(Math.log(Math.max(times[times.length - 1], 0.1)), low + 0.1);
    const bins = new Uint32Array(40);
    for (const t of times) bins[Math.min(39, Math.floor(40 * (Math.log(Math.max(t, 0.1)) - low) / (high - low)))]++;
    const most = Math.max(...bins), wide = width / 40;
    g.fillStyle = this.names[trace.category[picked[0]]];
    bins.forEach((n, k) => n && g.fillRect(k * wide, height - 16 - Math.max(2, (height - 22) * n / most), Math.max(wide - 1, 1), Math.max(2, (height - 22) * n / most)));
    g.fillStyle = this.soft;
    g.font = "11px system-ui, sans-serif";
    g.fillText(time(Math.exp(low)), 0, height - 3);
    g.textAlign = "right";
    g.fillText(time(Math.exp(high)), width, height - 3);
  }

  // What launched an event: the host's stack, with the source line where Python was recorded.
  origin(i) {
    const { trace } = this, stack = [];
    for (let up = trace.parent[i]; up >= 0 && stack.length < 14; up = trace.parent[up]) stack.push(trace.words.name[trace.name[up]]);
    const source = stack.find(name => /\.py\(\d+\)/.test(name));
    return el("div", {}, el("h5", { textContent: i < trace.hosts ? "inside" : "launched by" }), el("p", { className: "wlx-note" }, source ? el("b", { textContent: `${source} ` }) : "",
      el("code", { textContent: stack.length ? stack.map(name => short(name, 48)).join(" ‹ ") : "not in the trace" })));
  }

  // Every name with known operations and bytes: intensity and rate on logarithmic axes, below the ceilings.
  drawRoof() {
    const { trace, sums, state } = this, [g, width, height] = this.sized(this.roofCanvas, 230), roof = trace.ceilings;
    const points = [...sums.time.keys()].filter(i => sums.flop[i] > 0 && sums.bytes[i] > 0 && sums.whole[i] > 0)
      .map(i => ({ i, x: sums.flop[i] / sums.bytes[i], y: sums.flop[i] / sums.whole[i] / 1e6, r: Math.max(3, 22 * Math.sqrt(sums.time[i] / sums.all)) }));
    g.font = "11px system-ui, sans-serif";
    this.points = [];
    if (!points.length) {
      g.fillStyle = this.soft;
      g.fillText("No whole call with known operations is selected.", 8, 24);
      return;
    }
    const peaks = roof ? Object.entries(roof.tflop_per_s) : [];
    const x0 = Math.log10(Math.min(...points.map(p => p.x), 1)) - 0.3, x1 = Math.log10(Math.max(...points.map(p => p.x), 1e3)) + 0.3;
    const top = Math.max(...points.map(p => p.y), ...peaks.map(([, peak]) => peak)), y1 = Math.log10(top) + 0.25, y0 = Math.min(Math.max(Math.log10(Math.min(...points.map(p => p.y))) - 0.3, y1 - 5), y1 - 2);
    const left = 44, X = x => left + (width - left - 6) * (Math.log10(x) - x0) / (x1 - x0), Y = y => (height - 30) * (1 - (Math.log10(y) - y0) / (y1 - y0));
    g.fillStyle = this.soft;
    g.strokeStyle = this.line;
    for (let k = Math.ceil(x0); k <= x1; k++) { g.beginPath(); g.moveTo(X(10 ** k), 0); g.lineTo(X(10 ** k), height - 30); g.stroke(); g.textAlign = X(10 ** k) > width - 22 ? "right" : "center"; g.fillText(digits(10 ** k), Math.min(X(10 ** k), width), height - 17); }
    for (let k = Math.ceil(y0); k <= y1; k++) { g.beginPath(); g.moveTo(left, Y(10 ** k)); g.lineTo(width, Y(10 ** k)); g.stroke(); g.textAlign = "right"; g.fillText(digits(10 ** k), left - 5, Y(10 ** k) + 4); }
    g.textAlign = "center";
    g.fillText("FLOP per byte; vertical: TFLOP/s", left + (width - left) / 2, height - 3);
    g.save();
    g.beginPath();
    g.rect(left, 0, width - left, height - 30);
    g.clip();
    g.strokeStyle = this.soft;
    const named = [];
    for (const [format, peak] of peaks) {
      const knee = peak * 1e3 / roof.memory_gb_per_s;
      g.beginPath(); g.moveTo(X(10 ** x0), Y(10 ** x0 * roof.memory_gb_per_s / 1e3)); g.lineTo(X(knee), Y(peak)); g.lineTo(width, Y(peak)); g.stroke();
      g.textAlign = "right";
      if (!named.some(y => Math.abs(y - Y(peak)) < 11)) { g.fillText(format, width - 3, Y(peak) - 3); named.push(Y(peak)); }
    }
    for (const { i, x, y, r } of points) {
      g.globalAlpha = (state.name && trace.words.name[i] !== state.name) || (state.search && !sums.hit[i]) ? 0.15 : 0.8;
      g.fillStyle = this.names[sums.category[i]];
      g.beginPath(); g.arc(X(x), Y(y), r, 0, 7); g.fill();
      this.points.push({ i, x: X(x), y: Y(y), r });
    }
    g.restore();
  }

  drawFlame() {
    const { trace, sums, state } = this, tree = trace.tree, weights = sums.nodes, rows = 17;
    let deepest = 0;
    const children = new Map();
    for (let node = 1; node < weights.length; node++) if (weights[node] > weights[0] / 3000) {
      (children.get(tree.parent[node]) ?? children.set(tree.parent[node], []).get(tree.parent[node])).push(node);
      deepest = Math.max(deepest, tree.depth[node]);
    }
    const [g, width] = this.sized(this.flameCanvas, Math.max(3, deepest + 1) * rows + 2);
    g.font = "11px system-ui, sans-serif";
    this.boxes = [];
    const text = state.search?.toLowerCase();
    const put = (node, x, wide, level) => {
      const event = tree.first[node], name = node ? tree.names[tree.name[node]] : "all";
      const paint = node ? trace.paint[event] : trace.categories.length + trace.components.length;
      g.globalAlpha = text && node && !name.toLowerCase().includes(text) ? 0.25 : 1;
      g.fillStyle = this.names[paint];
      g.fillRect(x, level * rows, Math.max(wide - 0.5, 0.5), rows - 1);
      if (wide > 28) {
        const above = node && tree.parent[node] ? tree.names[tree.name[tree.parent[node]]] : "", label = above && name.startsWith(`${above}.`) ? name.slice(above.length + 1) : short(name);
        g.fillStyle = this.texts[paint];
        g.textAlign = "left";
        g.fillText(fitted(label, wide - 8), x + 4, level * rows + 12);
      }
      this.boxes.push([x, level * rows, wide, node]);
      let at = x;
      for (const child of (children.get(node) ?? []).sort((one, other) => weights[other] - weights[one])) {
        const share = wide * weights[child] / (weights[node] || 1);
        if (share > 0.4) put(child, at, share, level + 1);
        at += share;
      }
    };
    if (weights[0] > 0) put(0, 0, width, 0);
    g.globalAlpha = 1;
  }

  // Second trace: own time by module of all layers, on the same steps and modules as the selection.
  drawGrew() {
    const { trace, other, state, shared } = this, conditions = { ...state, side: other.side };
    const before = this.byPlace(trace, { ...state, side: trace.side }, null, shared), after = this.byPlace(other, conditions, null, shared);
    const places = state.between ? this.places(state.between, shared) : null, totals = new Map();
    for (const [sums, k] of [[before, 0], [after, 1]]) for (const [key, spent] of sums) {
      if (places && !places.has(key)) continue;
      const [, module] = key.split("\n"), name = part(module).replace(/^expert_(high|low)/, "expert") || "(no module)";
      const row = totals.get(name) ?? totals.set(name, [0, 0]).get(name);
      row[k] += spent;
    }
    const rows = [...totals].map(([name, [b, a]]) => [name, b, a, a - b]).sort((one, two) => Math.abs(two[3]) - Math.abs(one[3])).slice(0, 16);
    const most = Math.abs(rows[0]?.[3]) || 1, all = [...totals.values()].reduce(([x, y], [b, a]) => [x + b, y + a], [0, 0]);
    this.grew.replaceChildren(el("p", { className: "wlx-note", textContent: `${time(all[0])} before (${trace.title}), ${time(all[1])} after (${other.title})${places ? ", of modules and steps that lie in the stretch by half or more" : ""}. A module that only one of them names counts as the one around it.` }),
      el("table", {}, el("thead", {}, el("tr", {}, ...["module", "before", "after", "change", ""].map(textContent => el("th", { textContent })))),
        el("tbody", {}, ...rows.map(([name, b, a, change]) => {
          const bar = this.fill(Math.abs(change) / most, change > 0 ? "var(--wlx-more)" : "var(--wlx-less)");
          return el("tr", {}, el("td", { className: "text" }, el("code", { textContent: name })), el("td", { textContent: time(b) }), el("td", { textContent: time(a) }),
            el("td", { textContent: `${change > 0 ? "+" : "−"}${time(Math.abs(change))}` }), el("td", { className: "wlx-track" }, bar));
        }))));
  }

  byPlace(trace, state, between, shared) {
    const lit = this.marks(trace, { ...state, search: undefined }), sums = new Map(), wide = trace.words.module.length, flat = new Map();
    for (const lane of trace.lanes) if (lane.side === state.side) {
      const [first, last] = between ? this.within(trace, lane, between) : [lane.first, lane.last];
      for (let i = first; i < last; i++) if (!lit || lit[i]) {
        const share = between ? Math.max(Math.min(trace.end[i], between[1]) - Math.max(trace.start[i], between[0]), 0) / (trace.time[i] || 1) : 1, key = (trace.step[i] + 1) * wide + trace.module[i];
        flat.set(key, (flat.get(key) ?? 0) + share * trace.own[i]);
      }
    }
    const modules = trace.words.module.map(shared);
    for (const [key, spent] of flat) {
      const place = `${Math.floor(key / wide) - 1}\n${modules[key % wide]}`;
      sums.set(place, (sums.get(place) ?? 0) + spent);
    }
    return sums;
  }

  places(between, shared) {
    const state = { side: this.trace.side }, whole = this.byPlace(this.trace, state, null, shared), inside = this.byPlace(this.trace, state, between, shared);
    return new Set([...inside].filter(([key, spent]) => spent >= 0.5 * whole.get(key)).map(([key]) => key));
  }

  // A canvas as wide as its box, in the pixels of the screen.
  sized(canvas, height) {
    const width = this.widths.get(canvas), ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const g = canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    return [g, width, height];
  }

  // ---- timeline

  invalidate() {
    this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  draw() {
    const begin = performance.now(), ratio = devicePixelRatio || 1, width = this.box.clientWidth, height = Math.min(this.high_px, narrow() ? 300 : 380);
    if (width < 50) return;
    const W = Math.round(width * ratio), H = Math.round(height * ratio);
    if (this.canvas.width !== W || this.canvas.height !== H || !this.image) {
      this.canvas.width = W; this.canvas.height = H;
      this.canvas.style.height = `${height}px`;
      this.box.style.height = `${height}px`;
      this.spacer.style.height = `${this.high_px - height}px`;
      this.g = this.canvas.getContext("2d", { alpha: false });
      this.image = this.g.createImageData(W, H);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const gutter = this.gutter = narrow() ? 64 : GUTTER, { g, pixels } = this, plot = W - Math.round(gutter * ratio), left = W - plot;
    const [a0, b0] = this.view, scale = plot / (b0 - a0), a = Math.round(a0 * scale) / scale, b = a + plot / scale;
    const line = this.scanline?.length === plot ? this.scanline : (this.scanline = new Uint32Array(plot)), labels = [];
    pixels.fill(this.ground);
    const top = this.box.scrollTop, thick = Math.round(HIGH * ratio);
    this.rows.forEach((row, k) => {
      const y = AXIS + k * ROW - top;
      if (y + ROW < AXIS || y > height) return;
      line.fill(this.ground);
      const shift = row.second ? this.shift() : 0;
      this.scan(row, line, a + shift, b + shift, scale, labels, y);
      const from = Math.max(Math.round(y * ratio), 0), to = Math.min(Math.round(y * ratio) + thick, H);
      if (to > from) {
        pixels.set(line, from * W + left);
        for (let at = from + 1; at < to; at++) pixels.copyWithin(at * W + left, from * W + left, from * W + W);
      }
    });
    g.putImageData(this.image, 0, 0);
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.font = "10px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
    g.textBaseline = "middle";
    g.textAlign = "left";
    for (const [x, wide, y, paint, text] of labels) {
      g.fillStyle = this.texts[paint];
      g.fillText(text.slice(0, Math.floor((wide / ratio - 6) / 6.1)), gutter + x / ratio + 3, y + HIGH / 2 + 0.5);
    }
    this.overlay(g, width, height, gutter, a, (b - a) / (width - gutter));
    g.textBaseline = "alphabetic";
    this.measured.frames.push(performance.now() - begin);
    if (this.measured.frames.length > 2000) this.measured.frames.shift();
  }

  // One line of pixels: spans of a pixel or more as they are, a pixel of shorter ones in the colour of the longest.
  scan(row, line, a, b, scale, labels, y) {
    const { start, end, ids, sums } = row, n = start.length, plot = line.length, { shades } = this, dims = row.event ? row.second ? this.otherLit : this.lit : null;
    let i = lower(end, a);
    while (i < n && start[i] < b) {
      const x0 = Math.max(0, Math.floor((start[i] - a) * scale)), x1 = (end[i] - a) * scale;
      const one = x1 - x0 >= 1.5;
      let j = i + 1, k = i, level = LEVELS - 1;
      if (!one) {
        const edge = a + (x0 + 1) / scale;
        let stride = 1;
        while (j < n && start[j] < edge) { j += stride; stride *= 2; }
        j = lower(start, edge, Math.max(i + 1, j - stride), Math.min(j, n));
        if (j - i > 1 && end[j - 1] > edge) j--; // it goes on in the next pixel
        if (j - i > 1) k = row.most(i, j);
        level = Math.max(1, Math.min(LEVELS - 1, Math.ceil((LEVELS - 1) * (sums[j] - sums[i]) * scale)));
      }
      const id = ids[k], paint = row.paint(id), shade = shades[paint * LEVELS + (dims && !dims[id] ? 0 : level)];
      if (one) {
        const to = Math.min(plot, Math.floor(x1));
        line.fill(shade, x0, to - x0 > 4 ? to - 1 : to);
        if (to - x0 > 34 && labels.length < 150 && !(dims && !dims[id])) labels.push([x0, to - x0, y, paint, row.text(id)]);
      } else if (x0 < plot) line[x0] = shade;
      i = j;
    }
  }

  overlay(g, width, height, gutter, a, per) {
    const x = t => gutter + (t - a) / per;
    const top = this.box.scrollTop;
    if (this.state.between) {
      g.strokeStyle = g.fillStyle = this.accent;
      const band = (moments, y, high) => {
        const [from, to] = moments.map(t => Math.max(gutter, Math.min(width, x(t))));
        g.globalAlpha = 0.14; g.fillRect(from, y, to - from, high);
        g.globalAlpha = 1;
        for (const at of [from + 0.5, Math.max(to, from + 1) - 0.5]) { g.beginPath(); g.moveTo(at, y); g.lineTo(at, y + high); g.stroke(); }
      };
      if (!this.other) band(this.state.between, 0, height);
      else {
        const moved = this.state.between.map(t => this.aligned.at(t) - this.shift());
        this.rows.forEach((row, k) => { const y = AXIS + k * ROW - top; if (y > -ROW && y < height) band(row.second ? moved : this.state.between, y - 1, ROW); });
      }
    }
    // The axis, in a round step of at least 90 pixels.
    g.fillStyle = this.page; g.fillRect(0, 0, width, AXIS); g.fillRect(0, 0, gutter, height);
    const rough = 90 * per, power = 10 ** Math.floor(Math.log10(rough)), tick = [1, 2, 5, 10].map(k => k * power).find(k => k >= rough);
    g.fillStyle = this.soft; g.strokeStyle = this.line; g.font = "11px system-ui, sans-serif"; g.textAlign = "left";
    for (let t = Math.ceil((a - this.low) / tick) * tick + this.low; x(t) < width - 40; t += tick) {
      const at = Math.round(x(t)) + 0.5;
      if (at < gutter) continue;
      g.beginPath(); g.moveTo(at, 0); g.lineTo(at, AXIS - 4); g.stroke();
      g.fillText(moment(t - this.low, tick), at + 4, 8);
    }
    if (this.state.between) { // marked on the axis too
      const [from, to] = this.state.between.map(t => Math.max(gutter, Math.min(width, x(t))));
      g.fillStyle = this.accent; g.fillRect(from, AXIS - 4, Math.max(to - from, 1), 3);
    }
    this.rows.forEach((row, k) => {
      const y = AXIS + k * ROW - top + HIGH / 2;
      g.fillStyle = row.second ? this.soft : this.ink;
      if (row.label && y > AXIS && y < height) g.fillText(fitted(row.label, gutter - 6), 0, y);
    });
    if (document.activeElement === this.canvas) { g.strokeStyle = this.accent; g.strokeRect(0.5, 0.5, width - 1, height - 1); }
  }

  // From moments of the timeline to those of the second trace's rows, which have the same scale: the beginning of the selection,
  // or of what is shown, is the same place of the model in both.
  shift() {
    const anchor = this.state.between?.[0] ?? Math.max(this.view[0], this.low);
    return this.aligned.at(anchor) - anchor;
  }

  move(a, b) {
    const least = 1, most = (this.high - this.low) * 1.02, wide = Math.min(Math.max(b - a, least), most), middle = (a + b) / 2;
    let from = Math.max(middle - wide / 2, this.low - 0.01 * most);
    from = Math.min(from, this.high + 0.01 * most - wide);
    this.view = [from, from + wide];
    this.invalidate();
    clearTimeout(this.later);
    this.later = setTimeout(() => { this.state.view = this.view.map(t => Math.round(t * 1e3) / 1e3); this.changed(this.state); }, 250);
  }
  zoom(by, around = (this.view[0] + this.view[1]) / 2) {
    const [a, b] = this.view, wide = Math.min(Math.max((b - a) * by, 1), (this.high - this.low) * 1.02), share = (around - a) / (b - a);
    this.move(around - wide * share, around + wide * (1 - share));
  }
  pan(share) {
    const [a, b] = this.view;
    this.move(a + share * (b - a), b + share * (b - a));
  }
  moment(event) {
    const box = this.canvas.getBoundingClientRect(), share = (event.clientX - box.left - this.gutter) / (box.width - this.gutter);
    return this.view[0] + share * (this.view[1] - this.view[0]);
  }
  under(event) {
    const y = event.clientY - this.canvas.getBoundingClientRect().top, row = y > AXIS ? this.rows[Math.floor((y - AXIS + this.box.scrollTop) / ROW)] : null;
    if (!row) return null;
    const t = this.moment(event) + (row.second ? this.shift() : 0), per = (this.view[1] - this.view[0]) / this.canvas.clientWidth;
    let i = row.at(t);
    if (i < 0) { const next = lower(row.start, t); if (next < row.start.length && row.start[next] - t < 2 * per) i = next; }
    return i < 0 ? null : { row, i, id: row.ids[i] };
  }

  listen() {
    const { canvas } = this, touches = new Map();
    let drag = null;
    canvas.addEventListener("wheel", (event) => {
      const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
      if (!sideways && !event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return; // the page scrolls until the timeline is clicked
      event.preventDefault();
      if (sideways) this.pan((event.deltaX || event.deltaY) / 800); else this.zoom(1.0016 ** Math.max(-300, Math.min(300, event.deltaY)), this.moment(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      canvas.focus({ preventScroll: true });
      touches.set(event.pointerId, event);
      canvas.setPointerCapture?.(event.pointerId);
      drag = { x: event.clientX, from: this.moment(event), view: this.view, pinch: touches.size === 2 ? [...touches.values()] : null, moves: this.moves, moved: false };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag || !touches.has(event.pointerId)) { this.hover(event); return; }
      touches.set(event.pointerId, event);
      if (Math.abs(event.clientX - drag.x) > 3) drag.moved = true;
      if (drag.pinch && touches.size === 2) {
        const [p, q] = [...touches.values()], [p0, q0] = drag.pinch, far = Math.abs(p.clientX - q.clientX) || 1, was = Math.abs(p0.clientX - q0.clientX) || 1;
        this.view = drag.view;
        this.zoom(was / far, drag.from);
      } else if (drag.moves) {
        const [a, b] = drag.view, by = (drag.x - event.clientX) / (canvas.clientWidth - this.gutter) * (b - a);
        this.move(a + by, b + by);
      } else if (drag.moved) {
        this.state.between = [drag.from, this.moment(event)].sort((one, other) => one - other);
        this.invalidate();
      }
    });
    const end = (event) => {
      if (!touches.delete(event.pointerId) || !drag) return;
      const was = drag;
      drag = touches.size ? drag : null;
      if (was.moved && !was.moves && !was.pinch && event.type === "pointerup") this.set({ between: this.state.between.map(t => Math.round(t * 1e3) / 1e3) });
      else if (!was.moved && event.type === "pointerup") this.click(this.under(event));
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    canvas.addEventListener("focus", () => this.invalidate());
    canvas.addEventListener("blur", () => this.invalidate());
    canvas.addEventListener("dblclick", () => this.state.between && this.move(...this.state.between));
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const act = { w: () => this.zoom(0.7), s: () => this.zoom(1 / 0.7), a: () => this.pan(-0.15), d: () => this.pan(0.15), arrowup: () => this.zoom(0.7),
        arrowdown: () => this.zoom(1 / 0.7), arrowleft: () => this.pan(-0.15), arrowright: () => this.pan(0.15), 0: () => this.move(this.low, this.high),
        f: () => this.state.between && this.move(...this.state.between), "/": () => this.search.focus(),
        escape: () => this.set({ ...Object.fromEntries(FILTERS.map(key => [key, undefined])), side: this.state.side }) }[event.key.toLowerCase()];
      if (!act) return;
      event.preventDefault();
      event.stopPropagation(); // keys of JupyterLab's command mode
      act();
    });
    this.box.addEventListener("scroll", () => this.invalidate(), { passive: true });
    this.flameCanvas.addEventListener("click", event => this.node(this.boxAt(event)));
    this.flameCanvas.addEventListener("pointermove", (event) => {
      const node = this.boxAt(event);
      this.say(event, node === null ? null : [node ? this.trace.tree.names[this.trace.tree.name[node]] : "all", `${time(this.sums.nodes[node])}, ${digits(100 * this.sums.nodes[node] / this.sums.nodes[0])} %`]);
    });
    const near = event => { const box = this.roofCanvas.getBoundingClientRect(); return (this.points ?? []).find(p => Math.hypot(p.x - event.clientX + box.left, p.y - event.clientY + box.top) < p.r + 2); };
    this.roofCanvas.addEventListener("pointermove", (event) => {
      const p = near(event);
      this.say(event, p ? [this.trace.words.name[p.i], `${digits(this.sums.flop[p.i] / this.sums.whole[p.i] / 1e6)} TFLOP/s, ${time(this.sums.time[p.i])}`] : null);
    });
    this.roofCanvas.addEventListener("click", (event) => { const p = near(event); if (p) this.set({ name: this.trace.words.name[p.i] }); });
    for (const each of [this.flameCanvas, this.roofCanvas]) each.addEventListener("pointerleave", () => { this.tip.hidden = true; });
  }

  boxAt(event) {
    const box = this.flameCanvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const found = (this.boxes ?? []).find(([left, top, wide]) => x >= left && x < left + wide && y >= top && y < top + 17);
    return found ? found[3] : null;
  }

  // A frame of the flame graph: a range selects its module, a kernel its name.
  node(node) {
    if (node === null) return;
    const { trace } = this, event = trace.tree.first[node], name = node ? trace.tree.names[trace.tree.name[node]] : "";
    if (!node) this.set({ module: undefined, name: undefined });
    else if (trace.kind[event] === trace.range) this.set({ module: this.state.module === name ? undefined : name });
    else if (trace.words.name.includes(name)) this.set({ name: this.state.name === name ? undefined : name });
  }

  // An event of the timeline; on the lanes above, what it stands for.
  click(hit) {
    if (!hit) return;
    const { trace } = hit.row, s = trace.stretches;
    if (hit.row.module) {
      const module = trace.parts[trace.module[hit.id]] || undefined;
      this.set({ module: this.state.module === module ? undefined : module });
    } else if (hit.row.event) {
      this.picked = hit.row.second ? null : hit.id;
      const name = trace.words.name[trace.name[hit.id]];
      if (/^ProfilerStep#\d+$/.test(name)) this.set({ step: Number(name.slice(13)) });
      else if (trace.kind[hit.id] === trace.range) this.set({ module: trace.parts[trace.module[hit.id]] });
      else this.set({ name, side: hit.id < trace.hosts ? "host" : "gpu" });
    } else if (hit.row.key === "step") this.set({ step: this.state.step === s.step[hit.id] || s.step[hit.id] < 0 ? undefined : s.step[hit.id] });
    else {
      const [key, pairs] = hit.row.key === "component" ? ["component", trace.components] : ["category", trace.categories], name = pairs[s[key][hit.id]][0];
      this.set({ [key]: this.state[key] === name ? undefined : name });
    }
  }

  hover(event) {
    const hit = this.under(event);
    if (!hit) { this.tip.hidden = true; return; }
    const { row, i, id } = hit, { trace } = row, lines = [row.event ? row.text(id) : row.text(id) || "no step", `${time(row.end[i] - row.start[i])} at ${time(row.start[i] - (row.second ? trace.window_us[0] : this.low))}${row.second ? ` of ${trace.title}, the second trace` : ""}`];
    if (row.module) lines.push(trace.words.module[trace.module[id]], trace.step[id] >= 0 ? `step ${trace.step[id]}` : "");
    else if (row.event) {
      lines.push([trace.words.module[trace.module[id]], trace.step[id] >= 0 ? `step ${trace.step[id]}` : ""].filter(Boolean).join(", "), trace.words.shapes[trace.shapes[id]]);
      const rates = [trace.flop[id] ? `${digits(trace.flop[id] / trace.time[id] / 1e6)} TFLOP/s` : "", trace.bytes[id] ? `${digits(trace.bytes[id] / trace.time[id] / 1e3)} GB/s` : "",
        trace.roofline[id] > 0 ? `${digits(100 * trace.roofline[id] / trace.time[id])} % of the roofline` : ""].filter(Boolean);
      if (id >= trace.hosts || trace.side === "host") lines.push(rates.join(", "));
    }
    this.say(event, lines);
  }

  say(event, lines) {
    this.tip.hidden = !lines;
    if (!lines) return;
    this.tip.replaceChildren(...lines.filter(Boolean).map((text, k) => el("div", { className: k ? "" : "wlx-first", textContent: text.length > 220 ? `${text.slice(0, 220)}…` : text })));
    const box = this.root.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    this.tip.style.left = `${Math.max(0, Math.min(x + 14, box.width - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${y + 18}px`;
  }
}

const narrow = () => innerWidth < 640;
const fitted = (text, wide) => { const most = Math.floor(wide / 5.8); return text.length <= most ? text : most > 1 ? `${text.slice(0, most - 1)}…` : ""; };
const moment = (us, tick) => { const [unit, name] = tick >= 1e6 || us >= 1e7 && tick >= 1e5 ? [1e6, "s"] : tick >= 1e3 || us >= 1e4 && tick >= 100 ? [1e3, "ms"] : [1, "µs"]; return `${(us / unit).toLocaleString("en", { maximumFractionDigits: Math.max(0, Math.ceil(-Math.log10(tick / unit))) })} ${name}`; };

// ---- where it stands --------------------------------------------------------------------------------------------------------

async function show(root, bytes, state, changed) {
  const begin = performance.now(), data = decode(await unpacked(bytes));
  const explorer = new Explorer(root, data, state, changed);
  explorer.measured.open_all = performance.now() - begin;
  explorer.measured.shown = performance.now(); // since the page was asked for
  root.explorer = explorer;
  return explorer;
}

// Jupyter: the kernel sends the data as one binary message, and gets what is selected.
function render({ model, el: place }) {
  const root = el("div");
  place.append(root);
  root.textContent = "reading the trace…";
  let opened = null;
  const receive = async (message, buffers) => {
    if (message.kind !== "data" || opened) return;
    const view = buffers[0], bytes = view instanceof DataView ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : new Uint8Array(view);
    opened = await show(root, bytes, model.get("state") ?? {}, (state) => { model.set("state", { ...state }); model.save_changes(); });
  };
  model.on("msg:custom", receive);
  model.send({ kind: "ready" });
  return () => model.off("msg:custom", receive);
}

export default { render };
