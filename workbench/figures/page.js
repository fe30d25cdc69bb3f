// Figures are drawn in the reader's theme when they come into view, and again when the theme changes or a page is printed.
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {showSendToCloud: false, displaylogo: false, responsive: false};
const holders = [...document.querySelectorAll("[data-figure]")];

// On paper figures have this width (pixels), and page.css makes them smaller with their texts: A4 and letter paper have
// about 700 pixels between their margins. On the screen a figure has the width of its place.
const PAPER = 960;

function draw(holder, theme, width) {
  const wanted = width ? `${theme} on paper` : theme;
  if (holder.dataset.drawn === wanted) return;
  const source = document.getElementById(`${holder.id}-${theme}`);
  const figure = JSON.parse(source.textContent);
  if (width) figure.layout.width = width;
  else if (figure.layout.width > holder.clientWidth) figure.layout.width = Math.max(holder.clientWidth, 400);
  holder.dataset.drawn = wanted;
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
  for (const holder of holders) draw(holder, "light", PAPER);
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
  for (const holder of holders) draw(holder, current());
});
