// Sound that grows: waveform, spectrogram, playing. Items: first the layout, then int16 in base64.
const WINDOW = 256; // samples of one spectrum
const HOP = 64;
const LEAD = 0.15; // seconds that are there before playing begins
const WAVE = 96; // height of the waveform and of the spectrogram, CSS pixels
const SPECTRUM = 168;

const view = { run: 0, count: 0 };
const bar = make("div", "bar", root);
const button = make("button", "small", bar);
button.type = "button";
const clock = make("span", "clock", bar);
const choice = make("label", "choice", bar);
const live = make("input", "", choice);
live.type = "checkbox";
live.checked = true;
choice.append(" play at once");
const stack = make("div", "stack", root);
const waveform = make("canvas", "waveform", stack);
const spectrogram = make("canvas", "spectrogram", stack);
waveform.setAttribute("role", "img");
waveform.setAttribute("aria-label", "Waveform");
spectrogram.setAttribute("role", "img");
spectrogram.setAttribute("aria-label", "Spectrogram");
const seam = make("div", "seam", stack);
const head = make("div", "head", stack);
const hint = make("p", "hint", stack);
hint.textContent = "The sound appears here, as it is made.";
seam.hidden = true;

let layout = null;
let wave = new Float32Array(0);
let length = 0;
let columns = [];
let done = false;
let audio = null;
let parts = []; // what is scheduled: {source, start, from, length}
let sent = 0; // samples scheduled
let following = false; // plays while it grows
let muted = false; // the visitor stopped this one

function begin(chosen) {
  silence();
  layout = chosen;
  wave = new Float32Array(Math.round(chosen.rate * chosen.span) + 1);
  length = 0;
  columns = [];
  done = false;
  muted = false;
}

function append(values) {
  if (length + values.length > wave.length) {
    const larger = new Float32Array(2 * (length + values.length));
    larger.set(wave.subarray(0, length));
    wave = larger;
  }
  for (let i = 0; i < values.length; i++) wave[length + i] = values[i] / 32768;
  length += values.length;
  while (columns.length * HOP + WINDOW <= length) columns.push(spectrum(columns.length * HOP));
}

// Levels 0 … 255 over 80 dB of the WINDOW / 2 frequencies from sample `from` on.
const hann = Float32Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
function spectrum(from) {
  const re = new Float32Array(WINDOW);
  const im = new Float32Array(WINDOW);
  for (let i = 0, j = 0; i < WINDOW; i++) {
    re[j] = wave[from + i] * hann[i];
    let bit = WINDOW >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j |= bit;
  }
  for (let size = 2; size <= WINDOW; size *= 2) {
    for (let k = 0; k < size / 2; k++) {
      const cos = Math.cos((-2 * Math.PI * k) / size);
      const sin = Math.sin((-2 * Math.PI * k) / size);
      for (let a = k; a < WINDOW; a += size) {
        const b = a + size / 2;
        const x = re[b] * cos - im[b] * sin;
        const y = re[b] * sin + im[b] * cos;
        re[b] = re[a] - x;
        im[b] = im[a] - y;
        re[a] += x;
        im[a] += y;
      }
    }
  }
  return Uint8Array.from({ length: WINDOW / 2 }, (_, i) => {
    const level = 20 * Math.log10(Math.max(1e-4, Math.hypot(re[i], im[i]))) + 60;
    return (255 * Math.min(Math.max(level, 0), 80)) / 80;
  });
}

function shownSeconds() {
  const seconds = length / layout.rate;
  return Math.max(0.1, done ? seconds : Math.max(seconds, layout.span));
}

function render() {
  if (!layout) return;
  hint.hidden = true;
  const width = root.clientWidth;
  const seconds = shownSeconds();
  const across = (sample) => (width * sample) / layout.rate / seconds;
  drawWave(sharp(waveform, width, WAVE), width, across);
  drawSpectrum(sharp(spectrogram, width, SPECTRUM), across);
  seam.hidden = !layout.seam;
  seam.style.left = `${across(layout.seam)}px`;
  tick();
}

function drawWave(context, width, across) {
  context.fillStyle = `rgb(${colour("--series-1")})`;
  let peak = 0.05; // what is quieter stays small
  for (let i = 0; i < length; i++) peak = Math.max(peak, Math.abs(wave[i]));
  const perPixel = Math.max(1, Math.floor((length / Math.max(1, across(length)))));
  for (let x = 0; x < across(length); x++) {
    let low = 0;
    let high = 0;
    for (let i = x * perPixel; i < Math.min(length, (x + 1) * perPixel); i++) {
      low = Math.min(low, wave[i]);
      high = Math.max(high, wave[i]);
    }
    const top = (WAVE / 2) * (1 - (0.95 * high) / peak);
    context.fillRect(x, top, 1, Math.max(1, (WAVE / 2) * (1 - (0.95 * low) / peak) - top));
  }
}

function drawSpectrum(context, across) {
  if (columns.length) {
    const [r, g, b] = colour("--ink");
    const pixels = new ImageData(columns.length, WINDOW / 2);
    columns.forEach((levels, x) => {
      for (let k = 0; k < levels.length; k++) {
        const at = 4 * ((WINDOW / 2 - 1 - k) * columns.length + x);
        pixels.data.set([r, g, b, levels[k]], at);
      }
    });
    const whole = document.createElement("canvas");
    whole.width = columns.length;
    whole.height = WINDOW / 2;
    whole.getContext("2d").putImageData(pixels, 0, 0);
    context.drawImage(whole, 0, 0, across(columns.length * HOP + WINDOW - HOP), SPECTRUM);
  }
  context.fillStyle = `rgb(${colour("--ink")})`;
  context.strokeStyle = `rgb(${colour("--paper")})`; // a halo, to be read over dark and light
  context.lineWidth = 3;
  context.lineJoin = "round";
  context.font = "600 11px system-ui, sans-serif";
  for (let kilohertz = 1; kilohertz < layout.rate / 2000; kilohertz++) {
    const y = SPECTRUM * (1 - kilohertz / (layout.rate / 2000));
    context.fillRect(0, y, 5, 1);
    context.strokeText(`${kilohertz} kHz`, 8, y + 4);
    context.fillText(`${kilohertz} kHz`, 8, y + 4);
  }
}

// Playing

function schedule(from, to) {
  if (!audio || audio.sampleRate !== layout.rate) {
    if (audio) audio.close();
    audio = new AudioContext({ sampleRate: layout.rate });
  }
  audio.resume();
  const buffer = audio.createBuffer(1, to - from, layout.rate);
  buffer.copyToChannel(wave.subarray(from, to), 0);
  const source = audio.createBufferSource();
  source.buffer = buffer;
  source.connect(audio.destination);
  const last = parts[parts.length - 1];
  const free = last ? last.start + last.length / layout.rate : 0;
  const start = Math.max(free, audio.currentTime + 0.02);
  source.start(start);
  parts.push({ source, start, from, length: to - from });
  sent = to;
  requestAnimationFrame(tick);
}

function silence() {
  for (const part of parts) part.source.stop();
  parts = [];
  sent = 0;
  following = false;
  tick();
}

function position() {
  if (!audio) return null;
  const now = audio.currentTime;
  for (const part of parts) {
    if (now < part.start + part.length / layout.rate) {
      return part.from + Math.max(0, now - part.start) * layout.rate;
    }
  }
  return null;
}

function tick() {
  const at = layout ? position() : null;
  const playing = at !== null;
  if (!playing && done && parts.length) {
    parts = [];
    sent = 0;
    following = false;
  }
  head.hidden = !playing;
  if (playing) head.style.left = `${(root.clientWidth * at) / layout.rate / shownSeconds()}px`;
  button.textContent = playing || following ? "■ Stop sound" : "▶ Play";
  button.disabled = !length;
  const seconds = layout ? length / layout.rate : 0;
  clock.textContent = `${seconds.toFixed(2)} s`;
  if (playing) requestAnimationFrame(tick);
}

button.addEventListener("click", () => {
  if (position() !== null || following) {
    muted = true;
    return silence();
  }
  schedule(0, length);
});

root.addEventListener("hush", () => {
  muted = true;
  silence();
});

function draw() {
  const message = props.value;
  if (!message) return tick();
  for (const item of news(view, message, () => {})) {
    if (typeof item === "string") {
      append(new Int16Array(bytes(item).buffer));
    } else begin(item);
  }
  const ended = message.done && !done;
  done = message.done;
  const heard = live.checked && !muted && length > 0;
  if (heard && !done && message.play && length > LEAD * layout.rate) following = true;
  if (following && length > sent) schedule(sent, length);
  else if (ended && heard && !following && message.play !== null) schedule(0, length);
  if (done) following = false;
  render();
  root.dataset.done = done;
}

watch("value", draw);
draw();
whenResized(render);
whenRecoloured(render);
