"""A real JupyterLab and a real headless Chromium over a run of clinic notes; no model is needed."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from hallulib.clinic.facts import check
from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_reference, write_summary
from hallulib.files import project_root
from hallulib.recipe import load_recipe
from hallulib.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def pytest_collection_modifyitems(items):
    if CHROMIUM is None:
        why = "no Chromium on the PATH; on Debian: apt-get install chromium"
        for item in items:
            if "browser" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=why))


def make_assessment_run(folder, notes=24, words=0, overrides=None):
    """A run whose evaluation is recorded: sft fills in what the note leaves out, dpo does not.

    `words` lengthens each note to about so many words.
    """
    recipe = load_recipe("tiny-cpu", overrides or {})
    run = Run.open(folder, recipe)
    generations, verdicts = [], []
    for note in make_notes(notes, 7, missing_rate=0.5, prefix="test"):
        texts = {"sft": write_reference(note, 0, 0.8), "dpo": write_summary(note.facts)}
        padding = " ".join([note.text] * max(0, words // len(note.text.split())))
        for system, text in texts.items():
            row = {"id": note.id, "group_id": note.group_id, "system": system, "text": text}
            context = f"{note.text}\n\n{padding}".strip()
            prompt = f"Summarise the note.\n\n{context}"
            generations.append(row | {"context": context, "prompt": prompt})
            verdicts.append(make_verdict(row, check(note.facts, text)))
    write_evaluation(run, recipe, generations, verdicts)
    return recipe, run


def make_verdict(row, statements):
    wrong = any(s["verdict"] != "supported" for s in statements)
    judged = {"detector": "facts", "hallucinated": wrong, "omissions": []}
    return {"id": row["id"], "system": row["system"], "statements": statements} | judged


def write_evaluation(run, recipe, generations, verdicts):
    folder = run.path("evaluation")
    folder.mkdir(exist_ok=True)
    for name, rows in (("generations", generations), ("evaluation", verdicts)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "summary.json").write_text("{}")
    for name in ("model_card.md", "report.html", "report.md"):
        (folder / name).write_text("written by the evaluation")
    run.record("evaluation", recipe, {}, {})
    run.update(lambda manifest: manifest["stages"]["evaluation"]["inputs"].clear())


def copy_notebook(folder, run, overrides=None):
    """Notebook 07 in `folder`, with its parameters pointing at `run`."""
    notebook = nbformat.read(project_root() / "notebooks/07_assessment_widget.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = (
        f'recipe = "tiny-cpu"\nrun_dir = {str(run.root)!r}\noverrides = {overrides or {}!r}'
    )
    nbformat.write(notebook, Path(folder) / "07.ipynb")


class Lab:
    """A running JupyterLab; `url(name)` opens a notebook of its folder."""

    def __init__(self, folder, home):
        self.folder, self.port, self.token = folder, free_port(), secrets.token_hex(8)
        env = clean_environment(home)
        options = [
            f"--ServerApp.{name}={value}"
            for name, value in {
                "ip": "127.0.0.1",
                "port": self.port,
                "open_browser": False,
                "allow_root": True,
                "root_dir": folder,
                "port_retries": 0,
            }.items()
        ]
        self.log = open(home / "lab.log", "w")
        command = [sys.executable, "-m", "jupyterlab", *options]
        command.append(f"--IdentityProvider.token={self.token}")
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log)
        wait_for(f"http://127.0.0.1:{self.port}/api/status?token={self.token}", self.process)

    def url(self, name):
        return f"http://127.0.0.1:{self.port}/lab/tree/{name}?token={self.token}&reset"

    def stop(self):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


def clean_environment(home):
    """The environment of a server that reads no settings of whoever runs the tests."""
    settings = home / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    return os.environ | {
        "PYTHONPATH": str(project_root()),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
    }


def set_theme(home, name):
    path = home / "settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings"
    path.write_text(json.dumps({"theme": name}))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process, seconds=90):
    """Wait until `url` answers, or say that the server has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server has ended; see its log"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(url)


@contextmanager
def launch_chromium():
    """The installed Chromium, headless, through Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def browser():
    with launch_chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    server = Lab(home / "notebooks", home)
    yield server
    server.stop()


# --- what a person does in JupyterLab -------------------------------------------------------

WIDGET = ".hlw[aria-label='Assessment of summaries']"


def open_notebook(page, url):
    """The notebook in front, its kernel ready, the file browser closed."""
    page.goto(url)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=90_000)
    page.wait_for_timeout(1000)  # JupyterLab moves the focus once more after opening
    if page.locator(".jp-DirListing").first.is_visible():
        page.keyboard.press("Control+b")


def run_all(page, restart=False):
    """Kernel > Restart and run all, or Run > Run all; back when the widget is there."""
    if restart:
        page.click("li.lm-MenuBar-item >> text=Kernel")
        page.click("li[data-command='runmenu:restart-and-run-all']")
        page.click(".jp-Dialog button.jp-mod-accept")
    else:
        page.click(".jp-Cell >> nth=0")  # the menu acts on the notebook that has the focus
        page.click("li.lm-MenuBar-item >> text=Run")
        page.click("li[data-command='runmenu:run-all']")
    page.wait_for_function(
        "[...document.querySelectorAll('.jp-OutputArea-output')].some("
        "e => e.textContent.includes('checkpoint passed'))", timeout=90_000,
    )  # fmt: skip
    return show_widget(page)


def show_widget(page):
    """The widget, scrolled to the top of the notebook's window."""
    page.wait_for_selector(WIDGET, state="attached", timeout=90_000)
    widget = page.locator(WIDGET).first
    for _ in range(3):  # the notebook renders cells as they come into view, and moves
        widget.evaluate("e => e.scrollIntoView({block: 'start'})")
        page.wait_for_timeout(300)
    return widget


def wait_saved(page, events):
    """Wait until so many events are said to be on the disk."""
    page.wait_for_function(
        "([widget, n]) => document.querySelector(`${widget} .hlw-done`).textContent"
        ".includes(`(${n} event`)", arg=[WIDGET, events], timeout=10_000,
    )  # fmt: skip


def count_saved(page):
    """How many events are said to be on the disk."""
    text = page.locator(f"{WIDGET} .hlw-done").inner_text()
    return int(text.split("(")[1].split()[0])
