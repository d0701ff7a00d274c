"""`hallulib assess`: the widget without cells, and nothing else, to those who know the token."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest
from conftest import (
    WIDGET,
    clean_environment,
    count_saved,
    free_port,
    make_assessment_run,
    wait_for,
    wait_saved,
)

from hallulib.assessment.log import Log

pytestmark = [pytest.mark.browser, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(run, address without token, token) of a server started as a person would."""
    home = tmp_path_factory.mktemp("voila")
    _, run = make_assessment_run(home / "run", overrides={"assessment.assessor": "dana"})
    port = free_port()
    command = [sys.executable, "-m", "hallulib", "assess", "--run-dir", str(run.root)]
    command += ["--port", str(port), "--set", "assessment.assessor=dana"]
    process = subprocess.Popen(
        command, env=clean_environment(home), cwd=home, stdout=subprocess.PIPE, text=True
    )
    token = re.search(r"token=(\S+)", process.stdout.readline())[1]
    base = f"http://127.0.0.1:{port}"
    wait_for(f"{base}/voila/static/voila.js", process)
    yield run, base, token
    process.send_signal(signal.SIGINT)
    process.wait(20)


@pytest.fixture(scope="module")
def page(browser, served):
    _, base, token = served
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.goto(f"{base}/?token={token}")
    page.wait_for_selector(WIDGET, timeout=60_000)
    yield page
    page.close()


def events(run):
    return Log(next(run.path("assessment").glob("dana-*.events.jsonl"))).actions


def test_an_assessor_grades_by_mouse_and_key_and_sees_no_code(page, served):
    run = served[0]
    page.locator(f"{WIDGET} [data-act=verdict_supported]").click()
    wait_saved(page, 1)
    page.keyboard.press("2")
    wait_saved(page, 2)
    page.keyboard.press("d")
    wait_saved(page, 3)
    assert [e.verdict for e in events(run)] == [
        "supported", "hallucinated", "hallucinated",
    ]  # fmt: skip
    text = page.content()
    assert "open_session" not in text and "Hallucinated" in text
    assert "Practice" in text and "Cohen" not in text  # what an assessor needs, and no more
    for name in ("sft", "dpo"):
        assert name not in page.inner_text("body").lower()
    if folder := os.environ.get("PICTURES"):
        page.screenshot(path=f"{folder}/voila.png", full_page=True)


def test_without_the_token_nothing_of_the_assessment_is_shown(browser, served):
    _, base, _ = served
    context = browser.new_context()  # of another person: no cookies
    stranger = context.new_page()
    stranger.goto(base)
    stranger.wait_for_timeout(1000)
    assert "/login" in stranger.url and "Item 1" not in stranger.inner_text("body")
    context.close()


@pytest.mark.parametrize(
    "path",
    [
        "/voila/files/assessment.ipynb", "/voila/files/../voila.json",
        "/voila/files/../run/assessment/summary.json",
        "/voila/files/%2e%2e/%2e%2e/etc/passwd", "/voila/static/%2e%2e/%2e%2e/%2e%2e/app.py",
        "/voila/templates/%2e%2e/%2e%2e/etc/passwd", "/api/contents", "/api/terminals",
        "/api/kernels", "/files/etc/passwd", "/tree",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file_or_to_an_api(served, path):
    _, base, token = served
    request = urllib.request.Request(
        f"{base}{path}", headers={"Authorization": f"token {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError:
        return
    assert "root:" not in body and "import " not in body and '"cells"' not in body
    assert '"id"' not in body[:50]  # not a list of kernels or contents


def test_the_token_stands_on_no_command_line(served):
    token = served[2]
    processes = psutil.process_iter(["cmdline"])
    lines = [" ".join(process.info["cmdline"] or []) for process in processes]
    assert any("-m voila" in line for line in lines) and not any(token in line for line in lines)


def test_a_visitor_cannot_run_code(page, served, tmp_path):
    mark = tmp_path / "mark"
    page.evaluate(RUN_CODE, f"open({str(mark)!r}, 'w').close()")
    assert not mark.exists()


def test_a_page_loaded_anew_goes_on_where_it_was(page, served):
    before = count_saved(page)
    page.reload()
    page.wait_for_selector(WIDGET, timeout=60_000)
    assert count_saved(page) == before
    assert page.locator(f"{WIDGET} .hlw-hallucinated").count() == 1
    assert "Item 1 of" in page.inner_text(f"{WIDGET} .hlw-head")


RUN_CODE = """async (code) => {
  const config = JSON.parse(document.getElementById("jupyter-config-data").textContent);
  const address = location.origin.replace("http", "ws");
  const socket = new WebSocket(`${address}/api/kernels/${config.kernelId}/channels`);
  await new Promise((resolve) => { socket.onopen = resolve; });
  socket.send(JSON.stringify({
    header: {msg_id: "1", msg_type: "execute_request", username: "", session: "1", version: "5.3",
      date: new Date().toISOString()},
    parent_header: {}, metadata: {}, channel: "shell", buffers: [],
    content: {code, silent: false, store_history: false, user_expressions: {},
      allow_stdin: false, stop_on_error: true},
  }));
  await new Promise((resolve) => setTimeout(resolve, 2000));
}"""
