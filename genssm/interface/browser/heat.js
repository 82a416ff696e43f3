// A heat map that grows by columns. Items: first the layout, then [levels in base64, text].
const MOST = 400; // characters of the text below
const view = { run: 0, count: 0 };
const frame = make("div", "frame", root);
const canvas = make("canvas", "", frame);
canvas.setAttribute("role", "img");
canvas.setAttribute("aria-label", "State of every layer while it samples");
const names = make("div", "names", frame);
const hint = make("p", "hint", frame);
hint.textContent = "One column for every token appears here.";
const said = make("p", "said", root);
let layout = null;
let columns = [];

function begin(chosen) {
  layout = chosen;
  columns = [];
  names.replaceChildren();
  for (const name of layout.names) make("span", "", names).textContent = name;
}

function render() {
  if (!layout) return;
  hint.hidden = true;
  canvas.width = layout.span;
  canvas.height = layout.rows;
  const low = colour("--heat-low");
  const high = colour("--heat-high");
  const pixels = new ImageData(layout.span, layout.rows);
  columns.forEach(([levels], x) => {
    for (let y = 0; y < layout.rows; y++) {
      const at = 4 * (y * layout.span + x);
      const level = levels[y] / 255;
      for (let c = 0; c < 3; c++) pixels.data[at + c] = low[c] + level * (high[c] - low[c]);
      pixels.data[at + 3] = 255;
    }
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  said.textContent = ending(columns.map(([, text]) => text).join("")) || "\u00a0";
}

// The end of a text, from a word on.
function ending(text) {
  return text.length > MOST ? `… ${text.slice(-MOST).replace(/^\S*\s/, "")}` : text;
}

function draw() {
  if (!props.value) return;
  for (const item of news(view, props.value, () => {})) {
    if (Array.isArray(item)) columns.push([bytes(item[0]), item[1]]);
    else begin(item);
  }
  render();
}
watch("value", draw);
draw();
whenRecoloured(render);
