// Text in pieces [text, bits], each tinted by its surprise; bits is null for what was given.
const MOST = 12; // bits of the strongest tint
const view = { run: 0, count: 0 };
const page = make("div", "page", root);
page.tabIndex = 0;
page.setAttribute("role", "region");
page.setAttribute("aria-label", `${root.dataset.label}: text tinted by surprise`);
const key = make("p", "key", root);
key.innerHTML = "surprise <span>0</span><i></i><span>12 bits and more</span>";
const tip = make("div", "tip", root);
tip.hidden = true;
tip.setAttribute("role", "status");

function clear() {
  page.replaceChildren();
  looked = -1;
  tip.hidden = true;
}

function draw() {
  const message = props.value;
  if (!message) return;
  const following = page.scrollHeight - page.scrollTop - page.clientHeight < 40;
  const added = document.createDocumentFragment();
  for (const [text, bits] of news(view, message, clear)) {
    const piece = make("span", bits === null ? "told" : "drawn", added);
    piece.textContent = text;
    if (bits === null) continue;
    piece.dataset.bits = bits.toFixed(1);
    piece.style.setProperty("--surprise", Math.min(bits / MOST, 1).toFixed(3));
  }
  page.append(added);
  page.classList.toggle("growing", !message.done);
  if (following) page.scrollTop = page.scrollHeight;
}

let looked = -1; // the piece that the arrow keys have come to

function tell(piece) {
  page.querySelector(".looked")?.classList.remove("looked");
  tip.hidden = !piece;
  if (!piece) return;
  const bits = Number(piece.dataset.bits);
  const chance = 100 * 2 ** -bits;
  const percent = chance >= 10 ? chance.toFixed(0) : chance >= 0.1 ? chance.toFixed(1) : "< 0.1";
  tip.textContent = `${piece.dataset.bits} bits · probability ${percent} %`;
  const box = piece.getBoundingClientRect();
  const frame = root.getBoundingClientRect();
  tip.style.left = `${Math.max(0, Math.min(box.left - frame.left, frame.width - tip.offsetWidth))}px`;
  tip.style.top = `${box.top - frame.top - tip.offsetHeight - 4}px`;
}

function point(event) {
  tell(event.target.closest(".drawn"));
}

function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const pieces = page.querySelectorAll(".drawn");
  if (!step || !pieces.length) return;
  event.preventDefault();
  looked = Math.max(0, Math.min(looked + step, pieces.length - 1));
  const piece = pieces[looked];
  piece.scrollIntoView({ block: "nearest" });
  tell(piece);
  piece.classList.add("looked");
}
page.addEventListener("pointerover", point);
page.addEventListener("click", point);
page.addEventListener("pointerleave", () => tell(null));
page.addEventListener("keydown", walk);
page.addEventListener("blur", () => tell(null));
watch("value", draw);
draw();
