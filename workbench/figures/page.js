// Figures are drawn in the reader's theme when they come into view, and again when the theme changes or a page is printed.
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {showSendToCloud: false, displaylogo: false, responsive: false};
const holders = [...document.querySelectorAll("[data-figure]")];

function draw(holder, theme) {
  if (holder.dataset.drawn === theme) return;
  const source = document.getElementById(`${holder.id}-${theme}`);
  const figure = JSON.parse(source.textContent);
  holder.dataset.drawn = theme;
  return Plotly.react(holder, figure.data, figure.layout, config);
}

const current = () => (dark.matches ? "dark" : "light");
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target, current());
}, {rootMargin: "400px"});
for (const holder of holders) watcher.observe(holder);
dark.addEventListener("change", () => {
  for (const holder of holders) if (holder.dataset.drawn) draw(holder, current());
});

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
  for (const holder of holders) draw(holder, "light");
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
  for (const holder of holders) draw(holder, current());
});
