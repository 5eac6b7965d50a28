// Faults of the page that is shown, a line each; `side` is how far a text may stand out of its figure, px.
(side) => {
  const found = [], name = e => `${e.tagName.toLowerCase()}.${e.className?.baseVal ?? e.className} “${e.textContent.trim().slice(0, 50)}”`;
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) found.push(`the page is ${page.scrollWidth} px wide`);
  for (const e of document.querySelectorAll("main *:not(svg *):not(option)")) {
    if (e.scrollWidth <= e.clientWidth + 1 || !e.clientWidth || e.closest(".figure") || e.tagName === "VIDEO") continue;
    const over = getComputedStyle(e).overflowX;
    if (over === "visible") {
      // What stands out of a box is seen, unless a box around it cuts it off.
      const cut = e.parentElement.closest(".edge, pre, .sheet");
      if (!cut && e.getBoundingClientRect().left + e.scrollWidth > page.clientWidth + 1) found.push(`${name(e)} stands out of the page`);
    } else if (!e.classList.contains("edge") && !["PRE", "INPUT", "SELECT", "BUTTON"].includes(e.tagName)) found.push(`${name(e)} is cut off without a sign`);
    else if (e.classList.contains("edge") && e.scrollLeft === 0 && !e.classList.contains("right")) found.push(`${name(e)} has no fading edge`);
  }
  // Corners of a text on the screen, turned as it is turned.
  const corners = (text) => {
    const box = text.getBBox(), to = text.getScreenCTM(), in_ = 1.5;
    return [[box.x + in_, box.y + in_ * 1.6], [box.x + box.width - in_, box.y + in_ * 1.6], [box.x + box.width - in_, box.y + box.height - in_ * 1.6],
      [box.x + in_, box.y + box.height - in_ * 1.6]].map(([x, y]) => [to.a * x + to.c * y + to.e, to.b * x + to.d * y + to.f]);
  };
  const apart = (a, b) => [a, b].some(p => p.some(([x, y], i) => {
    const [u, v] = p[(i + 1) % 4], nx = v - y, ny = x - u;
    const along = q => q.map(([s, t]) => s * nx + t * ny);
    return Math.max(...along(a)) <= Math.min(...along(b)) || Math.max(...along(b)) <= Math.min(...along(a));
  }));
  for (const figure of document.querySelectorAll(".figure, .lines")) {
    const box = figure.getBoundingClientRect(), texts = [];
    for (const text of figure.querySelectorAll("svg text")) {
      const style = getComputedStyle(text);
      if (!text.textContent.trim() || style.visibility === "hidden" || style.display === "none" || text.closest(".hoverlayer, .modebar, clipPath, defs, .iciclelayer, .treemaplayer, [style*='opacity: 0;']")) continue;
      const size = text.getBBox();
      if (size.width < 3 || size.height < 3 || +style.opacity === 0 || style.fillOpacity === "0") continue;
      const at = corners(text), xs = at.map(p => p[0]), ys = at.map(p => p[1]);
      if (Math.min(...xs) < box.left - side || Math.max(...xs) > box.right + side || Math.min(...ys) < box.top - side || Math.max(...ys) > box.bottom + side) {
        found.push(`figure ${figure.dataset.figure ?? figure.id}: “${text.textContent.slice(0, 40)}” leaves it`);
      }
      texts.push([text.textContent, at]);
    }
    let over = 0;
    for (let i = 0; i < texts.length && i < 600; i++) for (let j = i + 1; j < texts.length && j < 600; j++) {
      if (!apart(texts[i][1], texts[j][1]) && over++ < 3) found.push(`figure ${figure.dataset.figure ?? figure.id}: “${texts[i][0].slice(0, 40)}” lies over “${texts[j][0].slice(0, 40)}”`);
    }
    const legend = [...figure.querySelectorAll(".legendtext")].map(text => text.textContent);
    const twice = legend.filter((text, i) => legend.indexOf(text) !== i);
    if (twice.length) found.push(`figure ${figure.dataset.figure}: “${twice[0]}” stands twice in the legend`);
    for (const tick of figure.querySelectorAll(".xtick text, .ytick text")) {
      const title = figure.layout?.[tick.closest(".xtick") ? "xaxis" : "yaxis"]?.title?.text || "";
      if (/^-?[\d.]+k$/.test(tick.textContent) && /ms/.test(title)) found.push(`figure ${figure.dataset.figure}: ${tick.textContent} ${title}`);
    }
  }
  for (const table of document.querySelectorAll("table:not(.parameters)")) for (const cell of table.querySelectorAll("td, th")) {
    const copy = cell.cloneNode(true);
    copy.querySelectorAll("code, a, input, .tags").forEach(e => e.remove());
    const text = copy.textContent;
    const bad = text.match(/\bnan\b|\bNone\b|\b(True|False)\b/i)?.[0]?.match(/NaN|nan|None|True|False/)?.[0] ?? text.match(/\b[a-z][a-z0-9]*_[a-z0-9_]+\b|\d\.0*[1-9]\d{4,}|\de[-+]\d+|[{}]|=\d+\.0\b/)?.[0];
    if (bad) found.push(`a table has ${bad} in “${text.trim().slice(0, 60)}”`);
  }
  return [...new Set(found)];
}
