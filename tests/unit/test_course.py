"""The course runner on small notebooks, executed for real by papermill in kernels of their own."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import psutil
import pytest
from hallulib.notebook import check_parameters
from notebook_factory import write_notebook
from run_factory import finish
from test_run import small_disk

from hallulib.course import find_notebooks, publish_gallery, run_course, select_notebooks
from hallulib.errors import DataError, HallulibError, RecipeError
from hallulib.files import sha256_file
from hallulib.recipe import load_recipe
from hallulib.report import read_headline, write_report
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


def call(folder, run_dir, **options):
    """One run_course on the small notebooks: (result, what it printed)."""
    stream = io.StringIO()
    with redirect_stdout(stream):
        result = run_course("tiny-cpu", run_dir, notebooks=folder, **options)
    return result, stream.getvalue()


def outputs_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return {c.id: "".join(o.get("text", "") for o in c.get("outputs", [])) for c in cells}


# --- one course, run once ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two notebooks, executed once: (folder of sources, run, what was printed, source texts)."""
    base = tmp_path_factory.mktemp("course")
    folder, run_dir = base / "notebooks", base / "run"
    show = "import os, sys; print(os.getcwd()); print(sys.executable); print(recipe, run_dir)"
    use = "held = b'x' * 120_000_000; import time; time.sleep(0.6)"
    write_notebook(folder, "01_data_prep", MAKE_DATA, show)
    summary = "import json, pathlib; p = pathlib.Path(run_dir) / 'evaluation'; p.mkdir(); "
    summary += f"_ = (p / 'summary.json').write_text({json.dumps(SUMMARY)!r})"
    write_notebook(folder, "02_two", use, summary)
    before = {path: path.read_text() for path in folder.iterdir()}
    result, printed = call(folder, run_dir)
    return folder, result, printed, before


def test_the_sources_are_executed_in_order_into_the_run_and_stay_as_they_were(finished):
    folder, result, _, before = finished
    assert result.executed == ["01_data_prep", "02_two"]
    assert {path: path.read_text() for path in folder.iterdir()} == before
    for name in result.executed:
        executed = nbformat.read(result.run.root / "notebooks" / f"{name}.ipynb", as_version=4)
        counts = [cell.execution_count for cell in executed.cells]
        assert counts == list(range(1, len(counts) + 1))


def test_a_notebook_runs_in_its_own_folder_with_this_interpreter_and_the_parameters(finished):
    folder, result, _, _ = finished
    shown = outputs_of(result.run.root / "notebooks" / "01_data_prep.ipynb")["step-2"].split("\n")
    assert shown == [str(folder), sys.executable, f"tiny-cpu {result.run.root}", ""]


def test_time_and_peak_memory_of_each_notebook_are_recorded(finished):
    records = finished[1].run.manifest["notebooks"]
    assert records["02_two"]["status"] == "done"
    assert 0.6 < records["02_two"]["wall_seconds"] < 60
    grown = records["02_two"]["peak_memory_bytes"] - records["01_data_prep"]["peak_memory_bytes"]
    assert grown > 50_000_000


def test_the_end_prints_headline_costs_and_where_to_read_on(finished):
    _, result, printed, _ = finished
    assert re.search(r"sft +300 +60.0 % +54.0 % - 65.0 % +1.0 % +100.0 %", printed)
    assert "peak GiB" in printed and re.search(r"01_data_prep +done +0\.", printed)
    assert f"{result.run.root.name}/report.html" in printed


def test_the_report_is_one_file_that_fetches_nothing(finished):
    text = (finished[1].run.root / "report.html").read_text()
    assert "60.0 %" in text and "01_data_prep" in text
    assert "http:" not in text and "https:" not in text and "<script" not in text


def test_nothing_is_run_again_when_nothing_has_changed(finished):
    folder, result, _, _ = finished
    again, printed = call(folder, result.run.root)
    assert (again.executed, again.skipped) == ([], ["01_data_prep", "02_two"])
    assert printed.count("unchanged, skipped") == 2


def test_the_gallery_takes_a_finished_run_stamps_it_and_refuses_another_source(tmp_path):
    folder, run_dir, gallery = (tmp_path / name for name in ("notebooks", "run", "gallery"))
    source = write_notebook(folder, "01_one", "print('a')")
    call(folder, run_dir)
    copy = publish_gallery(run_dir, folder, gallery)[0]
    stamp = nbformat.read(copy, as_version=4).metadata["hallulib"]
    assert stamp["source_sha"] == sha256_file(source) and stamp["recipe"] == "tiny-cpu"
    write_notebook(folder, source.stem, "print('b')")
    with pytest.raises(DataError, match="01_one"):
        publish_gallery(run_dir, folder, gallery)


def test_the_gallery_takes_nothing_that_prints_a_path_of_this_machine(finished, tmp_path):
    folder, result, _, _ = finished
    with pytest.raises(DataError, match="path of this machine"):
        publish_gallery(result.run.root, folder, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- what makes a notebook run again ---


def test_only_what_has_changed_is_run_again_and_force_runs_it_anyway(tmp_path):
    folder, run_dir = tmp_path / "notebooks", tmp_path / "run"
    write_notebook(folder, "01_data_prep", MAKE_DATA)
    write_notebook(folder, "02_two", "1")
    result, _ = call(folder, run_dir)
    copy = run_dir / "notebooks" / "01_data_prep.ipynb"

    write_notebook(folder, "02_two", "2")
    assert call(folder, run_dir)[0].executed == ["02_two"]

    result.run.path("data/audit.json").write_text("damaged")
    assert "01_data_prep" in call(folder, run_dir)[0].executed
    assert "made anew" in outputs_of(copy)["step-1"]

    # Another setting, which the data do not depend on: the page is new, the stage is reused.
    assert "01_data_prep" in call(folder, run_dir, overrides={"dpo.beta": 0.2})[0].executed
    assert "made anew" not in outputs_of(copy)["step-1"]

    forced, _ = call(folder, run_dir, overrides={"dpo.beta": 0.2}, only="1", force=True)
    assert forced.executed == ["01_data_prep"]
    assert "made anew" in outputs_of(copy)["step-1"]


def test_starting_later_mentions_the_stages_that_are_not_up_to_date(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_data_prep", "1")
    write_notebook(folder, "08_more", "1")
    result, printed = call(folder, tmp_path / "run", from_notebook="08")
    assert result.executed == ["08_more"]
    assert "Note: data (notebook 01_data_prep) is not up to date" in printed


# --- failures ---


def test_a_failing_cell_is_named_printed_kept_and_continued(tmp_path, capsys):
    folder, run_dir = tmp_path / "notebooks", tmp_path / "run"
    write_notebook(folder, "01_data_prep", MAKE_DATA)
    write_notebook(folder, "02_two", "print('before')", "1 / 0", "print('after')")
    with pytest.raises(HallulibError) as caught:
        run_course("tiny-cpu", run_dir, notebooks=folder)
    assert "02_two stopped in cell 'step-2'" in caught.value.what
    assert "02_two.ipynb" in caught.value.next_step
    assert "\nZeroDivisionError: division by zero\n" in capsys.readouterr().out
    kept = outputs_of(run_dir / "notebooks" / "02_two.ipynb")
    assert kept["step-1"] == "before\n" and kept["step-3"] == ""

    write_notebook(folder, "02_two", "print('before')", "1 / 1", "print('after')")
    result, _ = call(folder, run_dir)
    assert (result.skipped, result.executed) == (["01_data_prep"], ["02_two"])
    assert result.run.manifest["notebooks"]["02_two"]["status"] == "done"


def test_our_own_error_in_a_cell_is_printed_once_with_its_next_step(tmp_path, capsys):
    folder = tmp_path / "notebooks"
    raises = "from hallulib.errors import DataError; raise DataError('Too few rows.', 'Add some.')"
    write_notebook(folder, "01_one", raises)
    with pytest.raises(HallulibError) as caught:
        run_course("tiny-cpu", tmp_path / "run", notebooks=folder)
    assert capsys.readouterr().out.endswith("\nDataError: Too few rows.\nNext: Add some.\n")
    assert "Too few rows" not in str(caught.value)


def test_a_kernel_that_dies_is_a_failure_that_speaks_of_memory(tmp_path, capsys):
    write_notebook(tmp_path / "notebooks", "01_one", "import os; os._exit(9)")
    with pytest.raises(HallulibError, match="step-1"):
        run_course("tiny-cpu", tmp_path / "run", notebooks=tmp_path / "notebooks")
    assert "memory" in capsys.readouterr().out


def test_ctrl_c_stops_the_kernel_and_the_next_call_resumes(tmp_path):
    folder, run_dir = tmp_path / "notebooks", tmp_path / "run"
    write_notebook(folder, "01_data_prep", MAKE_DATA)
    wait = "import pathlib, time; pathlib.Path('begun').touch()\n"
    wait += "while not pathlib.Path('go').exists(): time.sleep(0.1)"
    write_notebook(folder, "02_two", wait)
    code = f"from hallulib.course import run_course as r; r('tiny-cpu', {str(run_dir)!r}, "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}notebooks={str(folder)!r})"],
        stderr=subprocess.DEVNULL,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for((folder / "begun").exists)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    assert kernels and psutil.wait_procs(kernels, timeout=10)[1] == []
    record = json.loads((run_dir / "manifest.json").read_text())["notebooks"]["02_two"]
    assert (record["status"], record["cell"]) == ("interrupted", "step-1")

    (folder / "go").touch()
    result, _ = call(folder, run_dir)
    assert (result.skipped, result.executed) == (["01_data_prep"], ["02_two"])


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_disk_that_fills_up_during_a_notebook_is_named_as_such(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_one", "print('x' * 400_000)")
    with small_disk(tmp_path / "disk", "rw") as disk:
        with pytest.raises((HallulibError, OSError), match="full|space left"):
            call(tmp_path / "notebooks", disk / "run")


# --- refused before any kernel starts ---


@pytest.fixture
def one(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_one", "raise SystemError('must not run')")
    return tmp_path / "notebooks", tmp_path / "run"


def test_a_wrong_recipe_key_is_refused_before_anything_runs(one):
    with pytest.raises(RecipeError, match="dpo.beta"):
        call(*one, overrides={"dpo.betta": 1})
    assert not one[1].exists()


def test_a_folder_of_another_recipe_is_refused_before_anything_runs(one):
    run_course("tiny-cpu", one[1], notebooks=write_done(one[0].parent / "other"))
    with pytest.raises(HallulibError):
        run_course("qwen2.5-0.5b", one[1], notebooks=one[0])


def write_done(folder):
    write_notebook(folder, "01_one", "1")
    return folder


def test_a_corrupted_manifest_is_refused_before_anything_runs(one):
    one[1].mkdir()
    (one[1] / "manifest.json").write_text("{")
    with pytest.raises(HallulibError):
        call(*one)


def test_a_notebook_that_does_not_declare_a_parameter_is_refused(tmp_path):
    write_notebook(tmp_path, "01_one", "1", parameters='recipes = "x"')
    with pytest.raises(RecipeError, match="no parameter 'recipe'. Did you mean 'recipes'"):
        call(tmp_path, tmp_path / "run")


def test_an_unknown_number_names_the_notebooks_there_are(one):
    with pytest.raises(RecipeError, match="01_one"):
        call(*one, only="04")


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="no notebooks"):
        find_notebooks(tmp_path)


@pytest.mark.parametrize("wanted", ["2", "02", "02_b"])
def test_a_notebook_is_chosen_by_number_or_name(wanted):
    sources = [Path("01_a.ipynb"), Path("02_b.ipynb"), Path("03_c.ipynb")]
    assert [p.stem for p in select_notebooks(sources, "", wanted)] == ["02_b"]
    assert [p.stem for p in select_notebooks(sources, wanted, "")] == ["02_b", "03_c"]


def test_from_and_only_together_are_refused():
    with pytest.raises(RecipeError):
        select_notebooks([Path("01_a.ipynb")], "1", "1")


# --- the parameter contract ---

TYPES = 'steps = 3  # n\nname = "a"  # t\nextra = {}\ntwice = 2 * 3  # n'


@pytest.fixture
def typed(tmp_path):
    return write_notebook(tmp_path, "01_typed", "1", parameters=TYPES)


def test_values_of_the_declared_types_are_taken(typed):
    check_parameters(typed, {"steps": 7, "name": "7", "extra": {"dpo.beta": 0.2}})


@pytest.mark.parametrize(
    ("name", "given"),
    [("steps", "7"), ("steps", 7.5), ("steps", True), ("name", 7), ("extra", []), ("twice", 6)],
)
def test_a_value_of_another_type_or_a_default_that_is_no_literal_is_refused(typed, name, given):
    with pytest.raises(RecipeError, match=f"declares '{name}'"):
        check_parameters(typed, {name: given})


def test_an_unknown_parameter_names_the_nearest(typed):
    with pytest.raises(RecipeError, match="'stepz'. Did you mean 'steps'"):
        check_parameters(typed, {"stepz": 1})


# --- what is shown ---


def test_progress_names_notebook_cell_and_time_and_what_the_last_run_took(finished, capsys):
    folder, result, printed, _ = finished
    assert re.search(r"\[2/2\] 02_two: done in 00:0\d, peak 0\.\d\d GiB", printed)
    run_course("tiny-cpu", result.run.root, notebooks=folder, only="1", force=True)
    shown = capsys.readouterr()
    assert re.search(r"\[1/2\] 01_data_prep: last time 00:0\d", shown.out)
    assert re.search(r"\[1/2\] 01_data_prep: cell \d/4, 00:00", shown.err)


def test_a_report_shows_what_is_in_the_manifest_as_text(tmp_path):
    recipe = load_recipe("tiny-cpu", {"description": "a <b> c"})
    run = Run.open(tmp_path / "run", recipe)
    finish(run, recipe, "data")
    run.update(lambda manifest: manifest["stages"]["data"].update(device="<i>gpu"))
    text = write_report(run).read_text()
    assert "a &lt;b&gt; c" in text and "&lt;i&gt;gpu" in text
    assert "Not evaluated yet" in text


def test_a_damaged_summary_is_an_error_that_names_its_notebook(tmp_path):
    assert read_headline(tmp_path).empty
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "summary.json").write_text('{"systems": {"sft": {}}}')
    with pytest.raises(DataError, match="06_evaluation"):
        read_headline(tmp_path)
