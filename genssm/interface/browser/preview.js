// An uploaded picture as the model will see it: the rows that it keeps, and those it will invent.
const canvas = make("canvas", "", root);
canvas.setAttribute("role", "img");
const note = make("p", "", root);

function draw() {
  const value = props.value;
  root.hidden = !value;
  if (!value) return;
  const { width, height, channels, keep } = value;
  canvas.width = width;
  canvas.height = height;
  canvas.setAttribute("aria-label", `Your picture; the upper ${keep} of ${height} rows are kept`);
  const values = bytes(value.picture);
  const pixels = new ImageData(width, height);
  for (let p = 0; p < width * height; p++) {
    const kept = p < keep * width;
    for (let c = 0; c < 3; c++) {
      const own = values[p * channels + (channels > 1 ? c : 0)];
      pixels.data[4 * p + c] = kept ? own : 128 + (own - 128) / 6;
    }
    pixels.data[4 * p + 3] = 255;
  }
  const context = canvas.getContext("2d");
  context.putImageData(pixels, 0, 0);
  context.fillStyle = `rgb(${colour("--accent")})`;
  if (keep > 0 && keep < height) context.fillRect(0, keep, width, 0.5);
  note.textContent = `${keep} rows kept, ${height - keep} to be drawn`;
}
watch("value", draw);
draw();
whenRecoloured(draw);
