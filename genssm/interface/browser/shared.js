// What the scripts of all live parts share. Gradio gives each of them: element, props, watch.
const root = element.firstElementChild;

function make(tag, className, parent) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (parent) parent.append(node);
  return node;
}

// The items of a message that are new to a view; a new run begins with reset().
function news(view, message, reset) {
  if (message.run !== view.run) {
    if (message.at > 0) return []; // its beginning was passed over; the last message holds all
    if (message.run < view.run) return []; // the end of what was replaced
    view.run = message.run;
    view.count = 0;
    reset();
    if (matchMedia("(max-width: 760px)").matches) {
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      root.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
    }
  }
  if (message.at > view.count) return [];
  const items = message.items.slice(view.count - message.at);
  view.count += items.length;
  return items;
}

function bytes(base64) {
  const text = atob(base64);
  const array = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) array[i] = text.charCodeAt(i);
  return array;
}

// A colour of the theme as [r, g, b].
function colour(name) {
  const probe = make("span", "", root);
  probe.style.color = `var(${name})`;
  const rgb = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return rgb;
}

// Call draw now and whenever the element gets another width.
function whenResized(draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    draw();
  }).observe(root);
}

// Call draw whenever the page turns light or dark; canvases do not follow by themselves.
function whenRecoloured(draw) {
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
}

// A canvas as sharp as the screen, as wide as the element: its context in CSS pixels.
function sharp(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return context;
}

