"""The memory sliders of notebook 3 in a real JupyterLab: what moves, redraws; what is missing can
be asked for."""

import hashlib

import nbformat
import pytest
from conftest import open_notebook

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

# With an empty folder for what is computed, so that a second run of the test meets the same.
CELL = """import tempfile
from pathlib import Path
from hallulib.memory import case, explorer, prediction_cache
empty = Path(tempfile.mkdtemp())
prediction_cache.resolve_path = lambda name: empty
explorer.make_explorer(case.LLAMA, 1024, 12)"""
PICTURE = ".jp-OutputArea-output img.widget-image"
BUTTON = ".jp-OutputArea-output button.jupyter-button:has-text('missing')"


@pytest.fixture(scope="module")
def page(browser, lab):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab.folder / "explorer.ipynb")
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(15_000)
    open_notebook(page, lab.url("explorer.ipynb"))
    page.click(".jp-Cell >> nth=0")
    page.click("li.lm-MenuBar-item >> text=Run")
    page.click("li[data-command='runmenu:run-all']")
    page.wait_for_selector(PICTURE, timeout=90_000)
    yield page
    page.close()


def read_picture(page):
    """A hash of what the picture shows (its bytes lie behind a blob: address)."""
    data = page.locator(PICTURE).evaluate(
        "async e => [...new Uint8Array(await (await fetch(e.src)).arrayBuffer())]"
    )
    return hashlib.sha256(bytes(data)).hexdigest()


def wait_for_other(page, before):
    for _ in range(100):
        page.wait_for_timeout(100)
        now = read_picture(page)
        if now != before:
            return now
    raise AssertionError("the picture stayed as it was")


def test_precision_pairs_and_strategies_redraw_the_figure(page):
    shown = [read_picture(page)]
    page.click("button.jupyter-button:has-text('bf16')")
    shown.append(wait_for_other(page, shown[-1]))
    handle = page.locator(".widget-inline-hbox:has-text('pairs') .noUi-handle")
    handle.focus()
    page.keyboard.press("ArrowRight")
    shown.append(wait_for_other(page, shown[-1]))
    page.locator(".widget-select-multiple select").select_option("two models")
    shown.append(wait_for_other(page, shown[-1]))
    assert len(set(shown)) == 4
    assert not page.locator(BUTTON).is_visible()


def test_what_was_never_predicted_is_offered_and_computed(page):
    page.click("button.jupyter-button:has-text('int8')")
    page.locator(".widget-select-multiple select").select_option(
        "cached reference, pass 1: reference"
    )
    page.locator(".widget-checkbox input").uncheck()
    page.wait_for_selector(BUTTON)
    page.wait_for_timeout(500)  # nothing is known now, so nothing is drawn
    before = read_picture(page)
    page.click(BUTTON)
    page.wait_for_selector(BUTTON, state="hidden", timeout=60_000)
    assert wait_for_other(page, before) != hashlib.sha256(b"").hexdigest()
