"""Single-key control of the widget. JupyterLab binds single keys itself, so the widget's root
carries the attribute that keeps its shortcuts off (`data-lm-suppress-shortcuts`)."""

from __future__ import annotations

import anywidget
import traitlets

_ESM = """
function render({ model, el }) {
  let root = null;
  const onKey = (event) => {
    const key = event.key.toLowerCase();
    const typing = event.target.closest("input, textarea, select, [contenteditable=true]");
    if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!model.get("bound").includes(key)) return;
    event.preventDefault();
    event.stopPropagation();
    model.set("pressed", [key, model.get("pressed")[1] + 1]);
    model.save_changes();
  };
  const attach = (tries) => {
    root = el.closest(".hlw");
    if (!root) {
      if (tries > 0) requestAnimationFrame(() => attach(tries - 1));
      return;
    }
    root.tabIndex = 0;
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "Assessment: keys " + model.get("bound").join(", "));
    root.setAttribute("data-lm-suppress-shortcuts", "true");
    root.addEventListener("keydown", onKey);
  };
  attach(100);
  return () => root && root.removeEventListener("keydown", onKey);
}
export default { render };
"""


class KeyCatcher(anywidget.AnyWidget):
    """Invisible; `pressed` is [key, count] of the last key of `bound` pressed inside the widget."""

    _esm = _ESM
    bound = traitlets.List(traitlets.Unicode()).tag(sync=True)
    pressed = traitlets.List(default_value=["", 0]).tag(sync=True)
