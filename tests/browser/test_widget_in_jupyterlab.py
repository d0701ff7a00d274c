"""Notebook 07 in a real JupyterLab and a real headless Chromium, by mouse and by keyboard."""

import json
import os
from pathlib import Path

import pytest
from conftest import (
    WIDGET,
    copy_notebook,
    count_saved,
    make_assessment_run,
    open_notebook,
    run_all,
    set_theme,
    show_widget,
    wait_saved,
)

from hallulib.assessment.log import Log

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(lab):
    recipe, run = make_assessment_run(lab.folder / "run")
    copy_notebook(lab.folder, run)
    return run


@pytest.fixture(scope="module")
def page(browser, lab, run):
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.set_default_timeout(15_000)
    open_notebook(page, lab.url("07.ipynb"))
    run_all(page)
    yield page
    page.close()


def read_events(run):
    return Log(next(run.path("assessment").glob("me-*.events.jsonl"))).actions


def graded(run):
    return [e.verdict for e in read_events(run) if e.do == "grade"]


def act(page, do, events=1):
    """Do something and wait until it is said to be on the disk."""
    before = count_saved(page)
    do()
    wait_saved(page, before + events)


def press(page, key):
    act(page, lambda: page.keyboard.press(key))


def keep_picture(page, name):
    """Written to the folder PICTURES names, for a person to look at."""
    show_widget(page)
    if folder := os.environ.get("PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_1_five_items_are_graded_by_mouse(page, run):
    widget = show_widget(page)
    for _ in range(5):
        for _ in range(widget.locator(".hlw-s").count() - 1):
            act(page, widget.locator("[data-act=verdict_supported]").click)
        act(page, widget.locator("[data-act=verdict_hallucinated]").click)
        act(page, widget.locator("[data-act=type_fabrication]").click)
        act(page, widget.locator("[data-act=severity_minor]").click)
        act(page, widget.locator("[data-act=go_save]").click)
    assert graded(run) == ["hallucinated"] * 5
    assert "Item 6 of" in widget.inner_text()


def test_2_after_a_click_the_keys_work_at_once_and_five_more_are_graded_by_key(page, run):
    widget = show_widget(page)
    for _ in range(5):
        for _ in range(widget.locator(".hlw-s").count()):
            press(page, "1")
        press(page, "Enter")
    assert graded(run)[5:] == ["supported"] * 5
    assert "10 graded" in widget.inner_text()
    keep_picture(page, "light")


def test_3_undo_takes_the_last_item_back(page, run):
    press(page, "u")
    assert "9 graded" in show_widget(page).inner_text()
    press(page, "Enter")
    assert read_events(run)[-2].do == "undo"
    assert "10 graded" in show_widget(page).inner_text()


def test_4_keys_that_jupyterlab_has_too_reach_only_the_widget(page):
    cells = page.locator(".jp-Cell").count()
    page.locator(f"{WIDGET} .hlw-head").click()
    for keys in ("b", "a", "dd"):  # insert a cell below, above, delete it
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_timeout(400)
        assert page.locator(".jp-Cell").count() == cells
    page.keyboard.press("Control+s")  # and with Ctrl they are JupyterLab's
    page.wait_for_selector(".jp-mod-dirty, .lm-TabBar-tab.jp-mod-dirty", state="detached")


def test_5_the_keyboard_reaches_everything_and_the_focus_is_seen(page):
    page.locator(f"{WIDGET} .hlw-head").click()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline, inside = page.evaluate(
            "e => { e = document.activeElement; return [e.dataset.act || e.name || e.className,"
            " getComputedStyle(e).outlineStyle, !!e.closest('.hlw')] }"
        )
        if not inside:
            break
        assert outline != "none", name
        seen.append(name)
    shown = page.locator(f"{WIDGET} [data-act]:not([tabindex='-1'])")
    assert set(shown.evaluate_all("all => all.map(e => e.dataset.act)")) <= set(seen)
    assert {"note", "omissions"} <= set(seen)


def test_6_typing_a_note_is_no_command_and_escape_gives_it_up(page, run):
    page.locator(f"{WIDGET} .hlw-head").click()
    page.keyboard.press("t")
    page.keyboard.type("s1 unsure")
    act(page, lambda: page.keyboard.press("Enter"))
    assert read_events(run)[-1].text == "s1 unsure"
    page.keyboard.press("t")
    page.keyboard.type("never mind")
    page.keyboard.press("Escape")
    press(page, "3")
    last = read_events(run)[-1]
    assert (last.do, last.verdict) == ("label", "unsure")
    assert not any(e.text == "never mind" for e in read_events(run))


def test_6b_keys_typed_faster_than_the_answers_come_are_all_kept(page, run):
    page.locator(f"{WIDGET} .hlw-head").click()
    page.locator(f"{WIDGET} .hlw-s").first.click()
    act(page, lambda: page.keyboard.type("2d1a2fi"), events=6)  # "a" after "1": not an error
    said = [[e.verdict, e.type, e.severity] for e in read_events(run)[-6:]]
    assert said[1] == ["hallucinated", "detail", None] and said[2][0] == "supported"
    assert said[-1] == ["hallucinated", "fabrication", "minor"]
    for _ in range(6):
        press(page, "u")


def test_6c_a_screen_reader_finds_names_states_and_what_has_happened(page):
    widget = show_widget(page)
    widget.locator(".hlw-head").click()
    press(page, "2")
    tree = widget.aria_snapshot()
    press(page, "u")
    for line in (
        'group "Assessment of summaries"', 'progressbar "Items graded"', 'region "Source note',
        'hallucinated 2" [pressed]', 'textbox "Note"', 'textbox "Left out of the summary"',
        "status: s2 hallucinated.",
    ):  # fmt: skip
        assert line.lower() in tree.lower(), line
    assert "- button\n" not in tree  # a button without a name


def test_7_every_text_has_a_contrast_of_at_least_4_5_in_light_and_dark(page, lab):
    assert find_low_contrast(page) == []
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1500)
    set_theme(lab.folder.parent, "JupyterLab Dark")
    page.reload()
    show_widget(page)
    page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    page.locator(f"{WIDGET} .hlw-head").click()
    press(page, "2")
    page.wait_for_timeout(300)
    assert find_low_contrast(page) == []
    keep_picture(page, "dark")


def test_8_after_a_reload_and_a_new_kernel_everything_is_still_there(page, run):
    before, text = graded(run), show_widget(page).locator(".hlw-head").inner_text()
    item = text.splitlines()[0]
    assert "10 graded" in text  # the page was reloaded above
    run_all(page, restart=True)
    widget = show_widget(page)
    head = widget.locator(".hlw-head").inner_text()
    assert head.splitlines()[0] == item and "10 graded" in head
    assert graded(run) == before
    assert "✗ Hallucinated" in widget.locator(".hlw-hallucinated").first.inner_text()
    keep_picture(page, "after")


def test_9_everything_fits_a_projector_and_a_4k_screen(page):
    for width, height in ((1280, 720), (3840, 2160)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(500)
        box = show_widget(page).bounding_box()
        window = page.locator(".jp-WindowedPanel-outer").first.bounding_box()
        assert box["height"] <= window["height"] and box["width"] <= window["width"]
    keep_picture(page, "4k")
    page.set_viewport_size({"width": 1280, "height": 720})


def test_a_dead_kernel_is_said_aloud(page):
    page.locator(f"{WIDGET} .hlw-head").click()
    page.click("li.lm-MenuBar-item >> text=Kernel")
    page.click("li[data-command='kernelmenu:shutdown']")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=unknown]", state="attached")
    widget = show_widget(page)
    widget.locator(".hlw-head").click()
    page.keyboard.press("1")
    page.wait_for_function(
        "w => document.querySelector(`${w} [role=alert]`).textContent.includes('No answer')",
        arg=WIDGET,
    )


def find_low_contrast(page):
    """Texts of the widget below 4.5:1, by the formula of WCAG 2."""
    return json.loads(page.evaluate(CONTRAST, WIDGET))


CONTRAST = """(widget) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
  const light = (c) => { const [r, g, b] = [...c].slice(0, 3).map((v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 250) return c; }
    return [255, 255, 255]; };
  const low = [];
  const root = document.querySelector(widget);
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([walk.currentNode.textContent.slice(0, 30), ratio]);
  }
  return JSON.stringify(low);
}"""
