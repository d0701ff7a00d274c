// The browser's half of the widget. Python renders every region as escaped HTML; this file puts it
// in place, keeps focus and scroll position, and sends back which button was pressed.
const REGIONS = ["head", "panes", "work", "foot"];
const PATIENCE_MS = 5000;
const UNANSWERED = "No answer from the kernel: the last action may not be saved. Run the notebook " +
  "cell of this widget again; everything saved before is kept.";

function render({ model, el }) {
  const root = build(model.get("label"));
  const shown = {};
  let waiting = null;

  function send(content) {
    root.dataset.busy = "true";
    clearTimeout(waiting);
    waiting = setTimeout(() => say("alert", UNANSWERED), PATIENCE_MS);
    model.send({ ...content, place: model.get("place") });
  }

  function update() {
    const regions = model.get("regions");
    for (const name of REGIONS) {
      if (shown[name] !== regions[name]) replace(root, name, regions[name]);
      shown[name] = regions[name];
    }
  }

  function answered() {
    clearTimeout(waiting);
    delete root.dataset.busy;
    const [kind, text] = model.get("message");
    say("alert", kind === "alert" ? text : "");
    say("status", kind === "alert" ? "" : text);
  }

  function say(kind, text) {
    root.querySelector(`[data-region=${kind}]`).textContent = text;
  }

  function onClick(event) {
    const button = event.target.closest("[data-act]");
    if (!button) return;
    if (event.detail > 0) root.focus({ preventScroll: true }); // a mouse: the keys go on working
    press(button);
  }

  function press(button) {
    if (button.dataset.focus) focusField(root, button.dataset.focus);
    else send({ act: button.dataset.act });
  }

  function onKey(event) {
    const field = event.target.closest("input");
    if (field) {
      if (event.key === "Escape") field.value = field.defaultValue;
      if (event.key === "Escape" || event.key === "Enter") root.focus({ preventScroll: true });
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const presses = key === "Enter" && event.target.closest("button"); // the button in focus
    const scrolls = key.startsWith("Arrow") && event.target.closest("[data-scroll]");
    const button = root.querySelector(`[aria-keyshortcuts="${CSS.escape(key)}"]`);
    if (presses || scrolls || event.shiftKey || !button) return;
    event.preventDefault();
    if (!event.repeat || key.startsWith("Arrow")) press(button);
  }

  // JupyterLab binds single keys on the document. Inside the widget they are the widget's, bound or
  // not (a stray "d d" must not delete the cell); with Ctrl or Cmd they stay JupyterLab's.
  function guard(event) {
    const ours = !(event.ctrlKey || event.metaKey);
    if (ours) root.setAttribute("data-lm-suppress-shortcuts", "true");
    else root.removeAttribute("data-lm-suppress-shortcuts");
  }

  root.addEventListener("mousedown", (e) => e.target.closest("button") && e.preventDefault());
  root.addEventListener("click", onClick);
  root.addEventListener("keydown", onKey);
  root.addEventListener("change", (e) => send({ field: e.target.name, text: e.target.value }));
  window.addEventListener("keydown", guard, true);
  model.on("change:regions", update);
  model.on("change:answered", answered);
  el.append(root);
  update();
  answered();
  return () => {
    clearTimeout(waiting);
    window.removeEventListener("keydown", guard, true);
  };
}

function build(label) {
  const root = document.createElement("div");
  root.className = "hlw";
  root.tabIndex = 0;
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", label);
  root.setAttribute("data-lm-suppress-shortcuts", "true");
  for (const name of REGIONS) add(root, name, {});
  add(root, "status", { role: "status", "aria-live": "polite" });
  add(root, "alert", { role: "alert", "aria-live": "assertive" });
  return root;
}

function add(root, name, attributes) {
  const part = document.createElement("div");
  part.dataset.region = name;
  for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
  root.append(part);
}

// New HTML for one region; what had the focus has it again, and the same item keeps its place.
function replace(root, name, html) {
  const part = root.querySelector(`[data-region=${name}]`);
  const active = part.contains(document.activeElement) ? document.activeElement : null;
  const wanted = active && (active.dataset.act || active.name || active.dataset.scroll);
  const scrolled = {};
  for (const pane of part.querySelectorAll("[data-scroll]"))
    scrolled[pane.dataset.scroll] = pane.scrollTop;
  part.innerHTML = html;
  for (const pane of part.querySelectorAll("[data-scroll]")) {
    pane.scrollTop = scrolled[pane.dataset.scroll] || 0;
    reveal(pane, pane.querySelector("[aria-current=true], mark"));
  }
  if (!wanted) return;
  const same = [...part.querySelectorAll("button, input, [data-scroll]")].find(
    (e) => [e.dataset.act, e.name, e.dataset.scroll].includes(wanted));
  (same || root).focus({ preventScroll: true });
}

// Scroll the pane, and only the pane, until `target` is in it.
function reveal(pane, target) {
  if (!target) return;
  const [outer, inner] = [pane.getBoundingClientRect(), target.getBoundingClientRect()];
  if (inner.top < outer.top) pane.scrollTop += inner.top - outer.top - 8;
  else if (inner.bottom > outer.bottom) pane.scrollTop += inner.bottom - outer.bottom + 8;
}

function focusField(root, name) {
  const field = root.querySelector(`input[name="${name}"]`);
  field.focus();
  field.select();
}

export default { render };
