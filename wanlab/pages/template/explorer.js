
// A report: the data lie in the page, and the address holds what is selected, so that a link reopens it.
for (const place of document.querySelectorAll("[data-explorer]")) {
  const number = place.dataset.explorer, key = `explore${number === "0" ? "" : number}`;
  const text = document.getElementById(`explorer-${number}`), bytes = Uint8Array.from(atob(text.textContent), letter => letter.charCodeAt(0));
  text.remove();
  const linked = () => { try { return JSON.parse(new URLSearchParams(location.hash.slice(1)).get(key)); } catch { return null; } };
  const first = JSON.parse(document.getElementById(`explorer-state-${number}`).textContent);
  const keep = (state) => {
    const hash = new URLSearchParams(location.hash.slice(1));
    hash.set(key, JSON.stringify(state));
    history.replaceState(null, "", `#${hash}`);
  };
  show(place, bytes, linked() ?? first, keep).then((explorer) => {
    addEventListener("hashchange", () => { const state = linked(); if (state) { explorer.state = { side: explorer.trace.side, ...state }; if (state.view) explorer.view = state.view; explorer.select(); explorer.invalidate(); } });
  });
}
