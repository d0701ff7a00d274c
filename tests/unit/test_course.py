"""The course runner on small notebooks, executed for real by papermill in kernels of their own."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from notebook_factory import write_notebook
from run_factory import finish

from hallulib.course import check_parameters, publish_gallery, run_course, select_notebooks
from hallulib.errors import DataError, HallulibError, RecipeError
from hallulib.files import sha256_file
from hallulib.recipe import load_recipe
from hallulib.report import write_report
from hallulib.run import Run

pytestmark = pytest.mark.unit

HERE = Path(__file__).parent
SUMMARY = {"systems": {"sft": {
    "n": 300, "hallucination_rate": 0.6, "interval": [0.54, 0.65], "omission_rate": 0.01,
    "answer_rate": 1.0, "more": "is ignored",
}}}  # fmt: skip
MAKE_DATA = f"""\
import sys
sys.path.insert(0, {str(HERE)!r})
from run_factory import finish
from hallulib.recipe import load_recipe
from hallulib.run import Run
effective = load_recipe(recipe, overrides)
run = Run.open(run_dir, effective)
if not run.is_current("data", effective):
    finish(run, effective, "data")
    print("made anew")"""


@pytest.fixture
def place(tmp_path):
    """(a folder for notebooks, a folder for the run)."""
    return tmp_path / "notebooks", tmp_path / "run"


def call(place, **options):
    """The names of the notebooks that one run_course has executed."""
    return run_course("tiny-cpu", place[1], notebooks=place[0], **options)


def outputs_of(place, name):
    """Cell id -> text, of the executed copy of a notebook."""
    cells = nbformat.read(place[1] / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return {c.id: "".join(o.get("text", "") for o in c.get("outputs", [])) for c in cells}


def records_of(place):
    return json.loads((place[1] / "manifest.json").read_text())["notebooks"]


# --- a course from its beginning to its end ---


def test_a_course_runs_in_order_shows_its_result_and_is_not_run_again(place, capsys):
    show = "import os, sys; print(os.getcwd()); print(sys.executable); print(recipe, run_dir)"
    sources = [write_notebook(place[0], "01_data_prep", MAKE_DATA, show)]
    use = "held = b'x' * 120_000_000; import time; time.sleep(0.6)"
    summary = "import json, pathlib; p = pathlib.Path(run_dir) / 'evaluation'; p.mkdir(); "
    summary += f"_ = (p / 'summary.json').write_text({json.dumps(SUMMARY)!r})"
    sources.append(write_notebook(place[0], "02_two", use, summary))
    before = [path.read_text() for path in sources]
    assert call(place) == ["01_data_prep", "02_two"]
    printed = capsys.readouterr().out

    # The sources stay as they were; the copies ran in order, here, with this interpreter.
    assert [path.read_text() for path in sources] == before
    for source in sources:
        cells = nbformat.read(place[1] / "notebooks" / source.name, as_version=4).cells
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = outputs_of(place, "01_data_prep")["step-2"].split("\n")
    assert shown == [str(place[0]), sys.executable, f"tiny-cpu {place[1]}", ""]

    # Time and peak memory are recorded for each notebook.
    one, two = records_of(place).values()
    assert (two["status"], two["wall_seconds"] > 0.6) == ("done", True)
    assert two["peak_memory_bytes"] - one["peak_memory_bytes"] > 50_000_000

    # The end shows headline, costs, and one report that fetches nothing.
    assert re.search(r"\[2/2\] 02_two: done in 00:0\d, peak 0\.\d\d GiB", printed)
    assert re.search(r"sft +300 +60.0 % +54.0 % - 65.0 % +1.0 % +100.0 %", printed)
    assert "peak GiB" in printed and re.search(r"01_data_prep +0\.", printed)
    assert "run/report.html" in printed
    page = (place[1] / "report.html").read_text()
    assert "60.0 %" in page and "01_data_prep" in page
    assert "http:" not in page and "https:" not in page and "<script" not in page

    assert call(place) == []
    assert capsys.readouterr().out.count("unchanged, skipped") == 2

    # The gallery takes nothing that prints a path of this machine.
    with pytest.raises(DataError, match="path of this machine"):
        publish_gallery(Run(place[1]), place[0], place[1].parent / "gallery")
    assert not (place[1].parent / "gallery").exists()


def test_the_gallery_takes_a_finished_run_stamps_it_and_refuses_another_source(place, tmp_path):
    source = write_notebook(place[0], "01_one", "print('a')")
    call(place)
    [copy] = publish_gallery(Run(place[1]), place[0], tmp_path / "gallery")
    stamp = nbformat.read(copy, as_version=4).metadata["hallulib"]
    assert stamp["source_sha"] == sha256_file(source) and stamp["recipe"] == "tiny-cpu"
    write_notebook(place[0], source.stem, "print('b')")
    with pytest.raises(DataError, match="01_one"):
        publish_gallery(Run(place[1]), place[0], tmp_path / "gallery")


def test_only_what_has_changed_is_run_again_and_force_runs_it_anyway(place):
    write_notebook(place[0], "01_data_prep", MAKE_DATA)
    write_notebook(place[0], "02_two", "1")
    call(place)
    write_notebook(place[0], "02_two", "2")
    assert call(place) == ["02_two"]

    (place[1] / "data" / "audit.json").write_text("damaged")
    assert "01_data_prep" in call(place)
    assert "made anew" in outputs_of(place, "01_data_prep")["step-1"]

    # Another setting, which the data do not depend on: the page is new, the stage is reused.
    assert "01_data_prep" in call(place, overrides={"dpo.beta": 0.2})
    assert "made anew" not in outputs_of(place, "01_data_prep")["step-1"]

    assert call(place, overrides={"dpo.beta": 0.2}, only="1", force=True) == ["01_data_prep"]
    assert "made anew" in outputs_of(place, "01_data_prep")["step-1"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_clock_shows_that_a_long_cell_is_alive(place, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    write_notebook(place[0], "01_one", "import time; time.sleep(2.5)")
    call(place)
    assert {"00:01", "00:02"} <= set(
        re.findall(r"01_one: [^\r]*(\d\d:\d\d)<", sys.stderr.getvalue())
    )


# --- failures ---


def test_a_failing_cell_is_named_printed_once_kept_and_continued(place, capsys):
    write_notebook(place[0], "01_data_prep", MAKE_DATA)
    raises = "from hallulib.errors import DataError; raise DataError('Too few rows.', 'Add some.')"
    write_notebook(place[0], "02_two", "print('before')", raises, "print('after')")
    with pytest.raises(HallulibError) as caught:
        call(place)
    assert "02_two stopped in cell 'step-2'" in caught.value.what
    assert "02_two.ipynb" in caught.value.next_step and "Too few rows" not in str(caught.value)
    assert capsys.readouterr().out.endswith("\nDataError: Too few rows.\nNext: Add some.\n")
    kept = outputs_of(place, "02_two")
    assert kept["step-1"] == "before\n" and kept["step-3"] == ""

    write_notebook(place[0], "02_two", "print('before')", "1 / 1", "print('after')")
    assert call(place) == ["02_two"]
    assert records_of(place)["02_two"]["status"] == "done"


def test_a_kernel_that_dies_is_a_failure_that_speaks_of_memory(place, capsys):
    write_notebook(place[0], "01_one", "import os; os._exit(9)")
    with pytest.raises(HallulibError, match="step-1"):
        call(place)
    assert "memory" in capsys.readouterr().out


def test_ctrl_c_stops_the_kernel_and_the_next_call_resumes(place):
    write_notebook(place[0], "01_data_prep", MAKE_DATA)
    wait = "import pathlib, time; pathlib.Path('begun').touch()\n"
    wait += "while not pathlib.Path('go').exists(): time.sleep(0.1)"
    write_notebook(place[0], "02_two", wait)
    folder, run_dir = map(str, place)
    code = f"from hallulib.course import run_course as r; r('tiny-cpu', {run_dir!r}, "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}notebooks={folder!r})"],
        stderr=subprocess.DEVNULL,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (place[0] / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    assert kernels and psutil.wait_procs(kernels, timeout=10)[1] == []
    record = records_of(place)["02_two"]
    assert (record["status"], record["cell"]) == ("interrupted", "step-1")

    (place[0] / "go").touch()
    assert call(place) == ["02_two"]


# --- refused before any kernel starts ---


def test_a_wrong_key_number_or_folder_is_refused_before_anything_runs(place):
    write_notebook(place[0], "01_one", "raise SystemError('must not run')")
    with pytest.raises(RecipeError, match="dpo.beta"):
        call(place, overrides={"dpo.betta": 1})
    assert not place[1].exists()
    with pytest.raises(RecipeError, match="01_one"):
        call(place, only="04")
    with pytest.raises(RecipeError, match="belongs to recipe 'tiny-cpu'"):
        run_course("qwen2.5-0.5b", place[1], notebooks=place[0])
    (place[1] / "manifest.json").write_text("{")
    with pytest.raises(HallulibError, match="cannot be read"):
        call(place)


def test_a_notebook_is_chosen_by_number_or_name_and_not_in_two_ways():
    sources = [Path("01_a.ipynb"), Path("02_b.ipynb"), Path("03_c.ipynb")]
    for wanted in ("2", "02", "02_b"):
        assert select_notebooks(sources, "", wanted) == sources[1:2]
        assert select_notebooks(sources, wanted, "") == sources[1:]
    with pytest.raises(RecipeError):
        select_notebooks(sources, "1", "1")


TYPES = 'steps = 3  # n\nname = "a"  # t\nextra = {}\ntwice = 2 * 3  # n'
WRONG = [("steps", "7"), ("steps", 7.5), ("steps", True), ("name", 7), ("extra", []), ("twice", 6)]


def test_a_parameter_is_declared_by_the_notebook_with_a_literal_of_its_type(tmp_path):
    typed = write_notebook(tmp_path, "01_typed", "1", parameters=TYPES)
    check_parameters(typed, {"steps": 7, "name": "7", "extra": {"dpo.beta": 0.2}})
    for name, given in WRONG:
        with pytest.raises(RecipeError, match=f"declares '{name}'"):
            check_parameters(typed, {name: given})
    with pytest.raises(RecipeError, match="no parameter 'stepz'. Did you mean 'steps'"):
        check_parameters(typed, {"stepz": 1})
    with pytest.raises(RecipeError, match="no parameter 'recipe'"):
        run_course("tiny-cpu", tmp_path / "run", notebooks=tmp_path)


def test_a_report_shows_what_is_in_the_manifest_as_text(tmp_path):
    recipe = load_recipe("tiny-cpu", {"description": "a <b> c"})
    run = Run.open(tmp_path / "run", recipe)
    finish(run, recipe, "data")
    run.update(lambda manifest: manifest["stages"]["data"].update(device="<i>gpu"))
    text = write_report(run).read_text()
    assert "a &lt;b&gt; c" in text and "&lt;i&gt;gpu" in text
    assert "Not evaluated yet" in text
