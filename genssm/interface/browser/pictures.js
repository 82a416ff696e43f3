// Pictures that grow row by row. Items: first the layout, then [sample, y, bytes of a row].
const MOST = 24; // bits of the brightest pixel of a surprise map
const GAP = 12; // between pictures, CSS pixels
const view = { run: 0, count: 0 };
const grid = make("div", "grid", root);
const bar = make("div", "bar", root);
const key = make("span", "key", bar);
const toggle = make("button", "small", bar);
toggle.type = "button";
toggle.hidden = true;
let layout = null;
let figures = [];
let surprise = null;
let mapped = false;

function figure(caption) {
  const node = make("figure", "", grid);
  const frame = make("div", "frame", node);
  const canvas = make("canvas", "", frame);
  canvas.width = layout.width;
  canvas.height = layout.height;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  const pixels = new ImageData(layout.width, layout.height);
  if (layout.kept > 0) {
    const seam = make("div", "seam", frame);
    seam.style.top = `${(100 * layout.kept) / layout.height}%`;
  }
  if (layout.original) make("figcaption", "", node).textContent = caption;
  return { node, canvas, context: canvas.getContext("2d"), pixels };
}

function fill(target, y, row) {
  const { width, channels } = layout;
  for (let x = 0; x < width * (row.length / (width * channels)); x++) {
    const at = 4 * (y * width + x);
    for (let c = 0; c < 3; c++) target.pixels.data[at + c] = row[x * channels + (channels > 1 ? c : 0)];
    target.pixels.data[at + 3] = 255;
  }
}

function begin(chosen) {
  layout = chosen;
  surprise = null;
  mapped = false;
  grid.replaceChildren();
  figures = [];
  const original = layout.original ? bytes(layout.original) : null;
  if (original) {
    const one = figure("original");
    fill(one, 0, original);
    one.context.putImageData(one.pixels, 0, 0);
    one.node.querySelector(".seam")?.remove();
  }
  for (let i = 0; i < layout.count; i++) {
    const one = figure(original ? `completion ${i + 1}` : `picture ${i + 1}`);
    if (original && layout.kept > 0) {
      fill(one, 0, original.subarray(0, layout.kept * layout.width * layout.channels));
    }
    one.context.putImageData(one.pixels, 0, 0);
    figures.push(one);
  }
  fit();
}

// Pixels of the model as whole numbers of pixels of the screen, all pictures in one square.
function fit() {
  if (!layout) return;
  const shown = layout.count + (layout.original ? 1 : 0);
  const columns = Math.ceil(Math.sqrt(shown));
  const ratio = window.devicePixelRatio || 1;
  const side = Math.min(root.clientWidth, 588);
  const room = (side - GAP * (columns - 1)) / columns;
  const scale = Math.max(1, Math.floor((room * ratio) / layout.width)) / ratio;
  grid.style.gridTemplateColumns = `repeat(${columns}, max-content)`;
  grid.style.minHeight = `${side}px`;
  for (const canvas of grid.querySelectorAll("canvas")) {
    canvas.style.width = `${layout.width * scale}px`;
    canvas.style.height = `${layout.height * scale}px`;
  }
}

function paint(one, i) {
  if (!mapped) return one.context.putImageData(one.pixels, 0, 0);
  const map = new ImageData(layout.width, layout.height);
  const low = colour("--heat-low");
  const high = colour("--heat-high");
  for (let p = 0; p < surprise[i].length; p++) {
    const level = Math.sqrt(surprise[i][p] / 255);
    for (let c = 0; c < 3; c++) map.data[4 * p + c] = low[c] + level * (high[c] - low[c]);
    map.data[4 * p + 3] = 255;
  }
  one.context.putImageData(map, 0, 0);
}

function label() {
  const size = `${layout.width} × ${layout.height} pixels`;
  const legend = `surprise <span>0</span><i></i><span>${MOST} bits and more</span>`;
  key.innerHTML = mapped ? legend : size;
  toggle.hidden = !surprise;
  toggle.textContent = mapped ? "Show the pictures" : "Show the surprise";
  toggle.setAttribute("aria-pressed", String(mapped));
}

function draw() {
  const message = props.value;
  if (!message) return;
  const changed = new Set();
  for (const item of news(view, message, () => {})) {
    if (!Array.isArray(item)) {
      begin(item);
      continue;
    }
    const [sample, y, row] = item;
    const one = figures[sample];
    fill(one, y, bytes(row));
    one.next = y + 1;
    changed.add(sample);
  }
  for (const sample of changed) {
    const one = figures[sample];
    one.context.putImageData(one.pixels, 0, 0);
    if (one.next < layout.height && !message.done) {
      one.context.fillStyle = `rgb(${colour("--accent")})`;
      one.context.fillRect(0, one.next, layout.width, 1);
    }
  }
  if (message.done) figures.forEach(paint);
  if (message.surprise) {
    surprise = message.surprise.map(bytes);
    mapped = true;
    figures.forEach(paint);
  }
  label();
  root.dataset.done = message.done;
}

toggle.addEventListener("click", () => {
  mapped = !mapped;
  figures.forEach(paint);
  label();
});
begin({ count: 4, height: 32, width: 32, channels: 3, kept: 0, original: null });
label();
watch("value", draw);
draw();
whenResized(fit);
whenRecoloured(() => mapped && figures.forEach(paint));
