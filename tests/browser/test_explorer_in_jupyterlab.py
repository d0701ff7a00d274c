"""The memory sliders of notebook 3 in a real JupyterLab: what moves, redraws."""

import hashlib

import nbformat
import pytest
from conftest import open_notebook

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CELL = """from hallulib import memory
memory.Explorer("Qwen/Qwen2.5-0.5B-Instruct", 256, 12)"""
PICTURE = ".jp-OutputArea-output img.widget-image"
STRATEGIES = ".widget-select-multiple select"


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
    for _ in range(300):
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
    page.locator(STRATEGIES).select_option("two models")
    shown.append(wait_for_other(page, shown[-1]))
    assert len(set(shown)) == 4
