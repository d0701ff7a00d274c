"""The assessment widget under load, measured in the browser: 2,000 items of 1,500 words.

    python benchmarks/widget_load.py

opens a real JupyterLab in a real headless Chromium (on Debian: apt-get install chromium; the rest
comes with `make test`) and rewrites its block of benchmarks/README.md. Time to open: from running
the cell to the first item on the screen, in a kernel that has run the notebook's setup cell. Time
to the next item: from a key to the next item painted.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import nbformat
from blocks import replace_block

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "browser"))

from conftest import (  # noqa: E402  the helpers of the browser tests
    WIDGET,
    Lab,
    launch_chromium,
    make_assessment_run,
    open_notebook,
)

ITEMS, WORDS, STEPS = 2000, 1500, 50
SETUP = """from hallulib import assessment
from hallulib.recipe import load_recipe
from hallulib.run import Run
config = load_recipe("tiny-cpu", {overrides!r})
run = Run.open({folder!r}, config)"""
OPEN = """session = assessment.open_session(run, config)
assessment.AssessmentWidget(session, quick={quick})"""
# Watches for the first item; the clock starts when the cell's run button is pressed.
WATCH = """(widget) => {
  window.started = performance.now();
  window.opened = null;
  const look = () => document.querySelector(`${widget} .hlw-pane`)
    ? requestAnimationFrame(() => { window.opened = performance.now() - window.started; })
    : requestAnimationFrame(look);
  look();
}"""
STEP = """async ([widget, keys]) => {
  const root = document.querySelector(widget), times = [];
  root.focus();
  for (const key of keys) {
    const place = () => root.querySelector(".hlw-head").textContent;
    const before = place(), start = performance.now();
    root.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    while (place() === before) await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
  }
  return times;
}"""


def measure_load(browser, lab: Lab, items: int, words: int, steps: int) -> dict[str, float]:
    """{open_s, again_s, next_ms, slowest_ms, sentence_ms}: the first opening, one of a session that
    has been graded in, the median and slowest step to a next item, a grade of one sentence."""
    overrides = {"assessment.items": items, "assessment.repeat_share": 0.0}
    _, run = make_assessment_run(lab.folder / "run", items // 2, words, overrides)
    for name, quick in (("first", True), ("again", False)):
        cells = [SETUP.format(overrides=overrides, folder=str(run.root)), OPEN.format(quick=quick)]
        notebook = nbformat.v4.new_notebook(
            cells=list(map(nbformat.v4.new_code_cell, cells)),
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        nbformat.write(notebook, lab.folder / f"{name}.ipynb")
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.set_default_timeout(30_000)
    opened = open_and_time(page, lab, "first")
    times = page.evaluate(STEP, [WIDGET, ["1"] * steps])
    page.click("li.lm-MenuBar-item >> text=Kernel")
    page.click("li[data-command='kernelmenu:shutdown']")
    again = open_and_time(page, lab, "again")
    sentence = page.evaluate(STEP, [WIDGET, ["1"] * 5])
    page.close()
    return {
        "open_s": opened / 1000, "again_s": again / 1000, "next_ms": statistics.median(times),
        "slowest_ms": max(times), "sentence_ms": statistics.median(sentence),
    }  # fmt: skip


def open_and_time(page, lab: Lab, name: str) -> float:
    """Milliseconds from running the cell of notebook `name` to its first item on the screen."""
    open_notebook(page, lab.url(f"{name}.ipynb"))
    page.click(".jp-CodeCell .cm-content >> nth=0")
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("document.querySelector('.jp-InputPrompt').textContent === '[1]:'")
    page.wait_for_timeout(500)
    page.evaluate(WATCH, WIDGET)
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("window.opened !== null")
    return page.evaluate("window.opened")


def describe(found: dict[str, float]) -> str:
    """The section for benchmarks/README.md."""
    return f"""## The assessment widget under load

{ITEMS:,} items, notes of about {WORDS:,} words, in JupyterLab and headless Chromium on a CPU
(`widget_load.py`):

| What | Measured |
|---|---|
| cell run until the first item is on the screen | {found['open_s']:.2f} s |
| the same for a session with {STEPS} grades, new kernel | {found['again_s']:.2f} s |
| key pressed until the next item is painted, median of {STEPS} | {found['next_ms']:.0f} ms |
| the slowest of them | {found['slowest_ms']:.0f} ms |
| key pressed until a sentence's grade is painted | {found['sentence_ms']:.0f} ms |
"""


def main() -> None:
    """Measure, print, and put the table into benchmarks/README.md."""
    with tempfile.TemporaryDirectory() as name, launch_chromium() as browser:
        home = Path(name)
        (home / "notebooks").mkdir()
        lab = Lab(home / "notebooks", home)
        try:
            text = describe(measure_load(browser, lab, ITEMS, WORDS, STEPS))
        finally:
            lab.stop()
    print(text)
    replace_block(HERE / "README.md", "widget_load", text)


if __name__ == "__main__":
    main()
