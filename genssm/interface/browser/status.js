// A line of text. It changes many times a second, so what is read aloud follows when it rests.
const REST = 1500; // milliseconds
const line = make("p", "", root);
line.setAttribute("aria-hidden", "true");
const said = make("p", "spoken", root);
said.setAttribute("role", "status");
let resting = 0;
let kind = "";

function say() {
  said.textContent = props.value || "";
}

function show() {
  const text = props.value || "";
  line.textContent = text || "\u00a0";
  clearTimeout(resting);
  resting = setTimeout(say, REST);
  const now = text.replace(/[\d.,]+/g, "");
  if (now !== kind) say();
  kind = now;
}
watch("value", show);
show();
