// A chart of series of points. value: {title, x: {label, log}, y: {label, log}, series, equal}.
const NAMESPACE = "http://www.w3.org/2000/svg";
const LEFT = 62;
const BOTTOM = 44;
const TOP = 14;
const RIGHT = 14;
const heading = make("p", "title", root);
const space = make("div", "space", root);
const legend = make("div", "legend", root);

function shape(tag, attributes, parent) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

function scale(axis, values, from, to) {
  const map = axis.log ? Math.log10 : (v) => v;
  let low = Math.min(...values.map(map));
  let high = Math.max(...values.map(map));
  if (axis.range) [low, high] = axis.range.map(map);
  if (axis.log) [low, high] = [low - 0.08, high + 0.08];
  if (high - low < 1e-9) [low, high] = [low - 0.5, high + 0.5];
  const place = (v) => from + ((map(v) - low) / (high - low)) * (to - from);
  return { place, ticks: ticks(axis, low, high) };
}

function ticks(axis, low, high) {
  if (axis.ticks) return axis.ticks;
  if (axis.log) {
    const steps = high - low < 1.6 ? [1, 2, 5] : [1];
    const stride = Math.max(1, Math.ceil((high - low) / 6));
    const found = [];
    for (let power = Math.floor(low); power <= high; power++) {
      if (((power % stride) + stride) % stride) continue;
      for (const step of steps) {
        const value = step * 10 ** power;
        if (Math.log10(value) >= low && Math.log10(value) <= high) found.push(value);
      }
    }
    return found;
  }
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(v);
  return found;
}

function written(value) {
  if (value === 0 || Math.abs(value) < 1e-12) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e5) return value.toLocaleString("en");
  if (size >= 1e5 || size < 1e-3) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

function render() {
  const chart = props.value;
  const width = root.clientWidth;
  if (!width) return;
  const height = Math.max(220, Math.min(320, width * 0.45));
  space.style.height = `${height}px`; // empty or not, so that nothing below moves
  space.replaceChildren();
  legend.replaceChildren();
  heading.textContent = chart?.title || "";
  const drawn = (chart?.series || []).filter((s) => s.points.length);
  if (!drawn.length) return;
  const inner = chart.equal ? Math.min(width, evenly(chart, height)) : width;
  const picture = shape("svg", { width: inner, height, role: "img", "aria-label": chart.title || "Chart" }, space);
  const points = drawn.flatMap((s) => s.points);
  const x = scale(chart.x, points.map((p) => p[0]), LEFT, inner - RIGHT);
  const y = scale(chart.y, points.flatMap((p) => p.slice(1)), height - BOTTOM, TOP);
  frame(picture, chart, x, y, inner, height);
  drawn.forEach((series) => plot(picture, series, x, y));
  if (drawn.length > 1 || drawn[0].name) drawn.forEach(explain);
}

// The width at which a unit is as long sideways as upwards; both axes have a range.
function evenly(chart, height) {
  const [across, up] = [chart.x, chart.y].map(({ range: [low, high] }) => high - low);
  return LEFT + RIGHT + ((height - TOP - BOTTOM) * across) / up;
}

function frame(picture, chart, x, y, width, height) {
  for (const value of y.ticks) {
    const at = y.place(value);
    shape("line", { x1: LEFT, x2: width - RIGHT, y1: at, y2: at, class: "rule" }, picture);
    shape("text", { x: LEFT - 8, y: at + 4, "text-anchor": "end" }, picture).textContent = written(value);
  }
  for (const value of x.ticks) {
    const at = x.place(value);
    shape("line", { x1: at, x2: at, y1: height - BOTTOM, y2: height - BOTTOM + 4, class: "rule" }, picture);
    shape("text", { x: at, y: height - BOTTOM + 18, "text-anchor": "middle" }, picture).textContent = written(value);
  }
  shape("text", { x: (LEFT + width) / 2, y: height - 6, "text-anchor": "middle", class: "label" }, picture)
    .textContent = chart.x.label;
  const middle = (TOP + height - BOTTOM) / 2;
  shape("text", { x: 12, y: middle, "text-anchor": "middle", class: "label",
    transform: `rotate(-90 12 ${middle})` }, picture).textContent = chart.y.label;
}

function plot(picture, series, x, y) {
  const group = shape("g", { class: `series series-${series.colour}` }, picture);
  if (series.kind === "spans") {
    for (const [at, low, middle, high] of series.points) {
      const place = x.place(at);
      shape("line", { x1: place, x2: place, y1: y.place(low), y2: y.place(high), class: "span" }, group);
      shape("circle", { cx: place, cy: y.place(middle), r: 4 }, group);
    }
    return;
  }
  const placed = series.points.map((p) => [x.place(p[0]), y.place(p[1])]);
  if (series.kind !== "dots") {
    const path = placed.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ");
    shape("polyline", { points: path }, group);
  }
  if (series.kind === "line") return;
  placed.forEach(([cx, cy], i) => {
    const dot = shape("circle", { cx, cy, r: series.kind === "dots" ? 1.6 : 3.5 }, group);
    shape("title", {}, dot).textContent = series.points[i].map(written).join(", ");
  });
}

function explain(series) {
  const entry = make("span", "entry", legend);
  make("i", `swatch series-${series.colour}`, entry);
  entry.append(series.name);
}

watch("value", render);
whenResized(render);
render();
