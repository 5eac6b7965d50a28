// The table stands already; the rest waits until the page has arrived, and plotly until it can be seen and used.
const withPlotly = (run) => {
  const text = document.getElementById("plotly");
  if (!plot || !text) return;
  requestAnimationFrame(() => setTimeout(() => {
    document.body.append(el("script", { textContent: text.textContent }));
    text.remove();
    run();
  }));
};
addEventListener("DOMContentLoaded", () => {
  if (lines) {
    drawLines();
    on("filter", drawLines);
    on("select", drawLines);
    addEventListener("resize", later(drawLines));
  }
  if (shelf) {
    showClips();
    on("filter", showClips);
    on("select", showClips);
  }
  explain(document.querySelector("header"));
  document.documentElement.dataset.ready = "yes";
  performance.mark("wanlab-ready");
  withPlotly(startFrontier);
});
