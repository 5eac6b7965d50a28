// What every page does: figures in the page's colours, clips in step, tables as CSV.
const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => innerWidth < 640;
const el = (tag, set = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), set);
  made.append(...children);
  return made;
};

const looks = () => ({
  "font.color": css("--ink"), "font.family": css("--sans"),
  "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
});
const axes = (layout) => {
  const looks = {};
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(key)) {
      looks[key + ".gridcolor"] = css("--line");
      looks[key + ".zerolinecolor"] = css("--line");
      looks[key + ".linecolor"] = css("--faint");
    }
  }
  return looks;
};

// A spreadsheet takes text that begins with one of these for a formula.
const cell = (value) => {
  if (value === null || value === undefined) return "";
  let text = typeof value === "object" ? JSON.stringify(value) : String(value);
  if (typeof value !== "number" && /^[=+\-@\t\r]/.test(text) && !/^[+-]?[\d.]+(e[+-]?\d+)?%?$/i.test(text)) text = "'" + text;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const csv = rows => rows.map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";
const download = (name, rows) => {
  const url = URL.createObjectURL(new Blob(["\ufeff", csv(rows)], { type: "text/csv;charset=utf-8" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};

// The numbers of a drawn figure: one row per point, one column per kind of number; a map has one row per cell.
const KINDS = ["ids", "parents", "labels", "values", "x", "base", "y", "text", "customdata"];
const figureRows = (place) => {
  const layout = place.layout || {}, used = new Set(), points = [];
  const array = value => Array.isArray(value) || ArrayBuffer.isView(value);
  for (const trace of place._fullData || []) {
    const name = trace.name || "";
    const put = (row) => { Object.keys(row).forEach(key => used.add(key)); points.push({ trace: name, ...row }); };
    if (array(trace.z) && array(trace.z[0])) {
      trace.z.forEach((line, j) => [...line].forEach((z, i) => put({
        x: trace.x ? trace.x[i] : i, y: trace.y ? trace.y[j] : j, z,
        ...(array(trace.text) && array(trace.text[j]) ? { text: trace.text[j][i] } : {}),
      })));
      continue;
    }
    const has = KINDS.filter(kind => array(trace[kind]));
    const errors = ["error_x", "error_y"].filter(kind => trace[kind] && array(trace[kind].array));
    const count = Math.max(0, ...has.filter(kind => kind !== "text" && kind !== "customdata").map(kind => trace[kind].length));
    for (let i = 0; i < count; i++) {
      const row = {};
      for (const kind of has) {
        const value = trace[kind][i];
        if (kind === "customdata" && array(value)) [...value].forEach((part, k) => { row[`detail ${k + 1}`] = part; });
        else row[kind === "customdata" ? "detail 1" : kind] = value;
      }
      for (const kind of errors) {
        row[kind + " above"] = trace[kind].array[i];
        if (array(trace[kind].arrayminus)) row[kind + " below"] = trace[kind].arrayminus[i];
      }
      put(row);
    }
  }
  const order = [...KINDS.slice(0, -1), "z"];
  const columns = [...used].sort((a, b) => (order.indexOf(a) + 1 || 99) - (order.indexOf(b) + 1 || 99));
  const title = axis => axis?.title?.text ?? (typeof axis?.title === "string" ? axis.title : "");
  const titled = { x: title(layout.xaxis), y: title(layout.yaxis) };
  const single = !Object.keys(layout).some(key => /^[xy]axis\d+$/.test(key));
  const plain = text => new DOMParser().parseFromString(text, "text/html").body.textContent;
  const heads = columns.map(key => single && titled[key] ? plain(titled[key]) : key);
  return [["trace", ...heads], ...points.map(point => [point.trace, ...columns.map(key => point[key])])];
};
const dataControl = (place, name) => {
  const button = el("button", { type: "button", className: "quiet", textContent: "data", title: "download the numbers of this figure as CSV" });
  button.addEventListener("click", () => download(name, figureRows(place)));
  place.after(el("p", { className: "under" }, button));
};

// Clips of a group start together, and start over together.
const inStep = (group) => {
  const videos = [...group.querySelectorAll("video")];
  if (!videos.length) return null;
  const gone = new Set();
  const alive = () => videos.filter(video => !gone.has(video));
  const play = () => alive().forEach(video => video.play().catch(() => {}));
  const rewind = () => alive().forEach(video => { video.currentTime = 0; });
  const restart = () => {
    if (!alive().every(video => video.ended)) return;
    rewind();
    play();
  };
  const ready = videos.map(video => new Promise((resolve) => {
    if (video.readyState >= 2) resolve();
    video.addEventListener("loadeddata", resolve, { once: true });
    video.addEventListener("error", () => { gone.add(video); resolve(); }, { once: true });
  }));
  for (const video of videos) {
    video.loop = false;
    video.muted = true;
    video.autoplay = false;
    video.preload = "auto";
    video.pause();
    video.addEventListener("ended", restart);
  }
  Promise.all(ready).then(() => { rewind(); if (!still) play(); });
  group.title = "click to pause or play";
  group.onclick = () => {
    const paused = alive().every(video => video.paused || video.ended);
    if (paused) { if (alive().every(v => v.ended)) restart(); else play(); } else alive().forEach(video => video.pause());
  };
  const bar = el("div", { className: "speeds" });
  for (const [speed, label] of [[1, "1×"], [0.5, "½×"], [0.25, "¼×"]]) {
    const button = el("button", { type: "button", textContent: label });
    button.setAttribute("aria-label", `speed ${label}`);
    button.setAttribute("aria-pressed", String(speed === 1));
    button.addEventListener("click", () => {
      videos.forEach(video => { video.defaultPlaybackRate = video.playbackRate = speed; });
      bar.querySelectorAll("button").forEach(b => b.setAttribute("aria-pressed", String(b === button)));
    });
    bar.append(button);
  }
  return bar;
};

// A box whose content is wider scrolls, by keys too, and fades where there is more.
const edges = (box) => {
  box.classList.add("edge");
  const look = () => {
    const more = box.scrollWidth - box.clientWidth;
    box.classList.toggle("left", box.scrollLeft > 1);
    box.classList.toggle("right", more > 1 && box.scrollLeft < more - 1);
    if (more > 1) { box.tabIndex = 0; box.setAttribute("role", "region"); if (!box.hasAttribute("aria-label")) box.setAttribute("aria-label", "scrolls sideways"); }
  };
  box.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(box);
  if (box.firstElementChild) new ResizeObserver(look).observe(box.firstElementChild);
  look();
};

// Terms of the glossary: where each stands first it can be pointed at, or touched, to be told what it means.
const explain = (root) => {
  const means = {};
  for (const { term, also, means: text } of JSON.parse(document.getElementById("terms").textContent)) {
    for (const word of [term, ...also]) means[word.toLowerCase()] = { term, text };
  }
  const words = Object.keys(means).sort((a, b) => b.length - a.length).map(word => word.replace(/[^\w ]/g, "\\$&"));
  const pattern = new RegExp(`(?<![\\w/-])(${words.join("|")})(?![\\w/-])`, "gi");
  const told = new Set(), walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walk.nextNode()) {
    if (!walk.currentNode.parentElement.closest("h1,h2,h3,a,code,pre,td,tbody,button,label,select,svg,summary,script,style,.figure,.facts,.what")) found.push(walk.currentNode);
  }
  for (const node of found) {
    const firsts = [...node.data.matchAll(pattern)].filter(([word]) => {
      const { term } = means[word.toLowerCase()];
      return !told.has(term) && told.add(term);
    });
    for (const { 0: word, index } of firsts.reverse()) {
      const rest = node.splitText(index);
      rest.splitText(word.length);
      const abbr = el("abbr", { className: "term", tabIndex: 0, textContent: word });
      abbr.setAttribute("aria-description", means[word.toLowerCase()].text);
      rest.replaceWith(abbr);
    }
  }
  const box = el("div", { id: "means", hidden: true });
  document.body.append(box);
  const show = ({ target }) => {
    const abbr = target.closest?.("abbr.term");
    box.hidden = !abbr;
    if (!abbr) return;
    box.textContent = abbr.getAttribute("aria-description");
    const at = abbr.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${at.bottom + 6 + box.offsetHeight < innerHeight ? at.bottom + 6 : at.top - box.offsetHeight - 6}px`;
  };
  const hide = () => { box.hidden = true; };
  for (const event of ["pointerover", "focusin", "click"]) document.addEventListener(event, show);
  addEventListener("scroll", hide, { passive: true, capture: true });
  addEventListener("keydown", event => event.key === "Escape" && hide());
};
