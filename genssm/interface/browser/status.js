// A line of text.
const line = make("p", "", root);
function show() {
  line.textContent = props.value || "\u00a0";
}
watch("value", show);
show();
