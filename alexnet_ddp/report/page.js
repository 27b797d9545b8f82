// Shows the values of a chart at the pointer. The page is complete without it.
"use strict";
const charts = JSON.parse(document.getElementById("values").textContent);

function nearest(points, x) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
  }
  return best;
}

function addLine(tip, colour, text) {
  const line = document.createElement("div");
  if (colour !== null) {
    const swatch = document.createElement("i");
    swatch.className = `swatch b${colour % 6}`;
    line.append(swatch);
  }
  line.append(text);
  tip.append(line);
}

for (const plot of document.querySelectorAll("[data-chart]")) {
  const { x, series } = charts[Number(plot.dataset.chart)];
  const [low, high, left, right] = x;
  const svg = plot.querySelector("svg");
  const cursor = plot.querySelector(".cursor");
  const tip = plot.querySelector(".tip");
  const width = svg.viewBox.baseVal.width;

  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const step = low + ((at - left) / (right - left)) * (high - low);
    const shown = series.map((one) => [one, nearest(one.points, step)]).filter(([, point]) => point);
    if (!shown.length) return;
    const snapped = nearest(shown.map(([, point]) => point), step)[0];
    const place = left + ((snapped - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren();
    addLine(tip, null, `step ${snapped.toLocaleString("en")}`);
    for (const [one, point] of shown) {
      const where = point[0] === snapped ? "" : ` (step ${point[0].toLocaleString("en")})`;
      addLine(tip, one.colour, `${one.label}: ${point[1]}${where}`);
    }
    tip.hidden = false;
    const share = place / width;
    tip.style.left = share < 0.5 ? `${100 * share + 2}%` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `${100 * (1 - share) + 2}%`;
  });
  plot.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
}
