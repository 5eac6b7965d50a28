// Clips of what is chosen, side by side and in step. One that lies in the page becomes a file only when it is played.
const shelf = document.getElementById("clips"), clipsNote = document.getElementById("clips-note");
const made = {};
const address = (clip) => {
  if (clip.href) return clip.href;
  if (!made[clip.clip]) {
    const bytes = Uint8Array.from(atob(document.getElementById(`clip-${clip.clip}`).textContent), c => c.charCodeAt(0));
    made[clip.clip] = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  }
  return made[clip.clip];
};
let playing = "";
const showClips = () => {
  const order = [...body.rows].map(row => Number(row.dataset.run));
  const chosen = order.filter(i => selected.has(i) && visible.has(i) && runs[i].clip);
  const shown = chosen.slice(0, board.playing);
  const cells = board.reference && shown.length ? [{ ...board.reference, run: null }] : [];
  shown.forEach(i => cells.push({ clip: runs[i].clip, title: runs[i].title, run: i }));
  clipsNote.textContent = chosen.length > shown.length ? `the first ${shown.length} of ${chosen.length} chosen runs`
    : chosen.length ? "" : "choose runs in the table or in the plot";
  const now = JSON.stringify(cells);
  if (now === playing) return;
  playing = now;
  const group = el("div", { className: "wl-clips" });
  for (const { clip, title, run } of cells) {
    const video = el("video", { playsInline: true, muted: true, src: address(clip) });
    const caption = el("figcaption", {}, el("span", { textContent: title, className: run === null ? "reference" : "" }));
    video.addEventListener("error", () => caption.append(el("small", { textContent: "the clip cannot be played" })));
    if (run !== null) {
      const of = column[state.x || metrics[0]?.key];
      const facts = [runs[run].baseline && "baseline", of && !Number.isNaN(measured(of.key, run)) && `${show(of, measured(of.key, run))} ${of.unit}`, of && against(of.key, run)];
      caption.append(el("small", { textContent: facts.filter(Boolean).join(" · ") }));
    }
    group.append(el("figure", {}, video, caption));
  }
  const bar = inStep(group);
  shelf.replaceChildren(group, ...(bar ? [bar] : []));
};
