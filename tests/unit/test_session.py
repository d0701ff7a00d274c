"""The assessment session: blinded queue, append-only actions, crashes, locks."""

import os
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest

from hallulib.assessment import session as session_module
from hallulib.assessment.log import Log
from hallulib.assessment.queue import add_repeats, plan_queue, split_sentences
from hallulib.assessment.session import Session, make_header
from hallulib.errors import HallulibError, SessionError

pytestmark = pytest.mark.unit


def make_rows(notes=9, end=""):
    return {
        (f"n{number}", system): {
            "context": f"Note {number}: no fever & BP < 120.",
            "text": f"Patient {number} is well. Takes 0.5 mg ({style}).{end}",
        }
        for number in range(notes)
        for system, style in (("base", "plain"), ("sft", "long"), ("dpo", "short"))
    }


def open_at(folder, rows=None, **changes):
    chosen = {"assessor": "Dr A", "mode": "single", "items": 12, "share": 0.25, "seed": 3} | changes
    rows, seed, mode = rows or make_rows(), chosen["seed"], chosen["mode"]
    header = make_header(chosen["assessor"], seed, mode)
    queue = plan_queue(rows, mode, chosen["items"], seed, header["assessor_id"])
    return Session(folder, rows, add_repeats(queue, chosen["share"], seed), header)


def grade(session, *verdicts):
    for verdict in verdicts:
        session.act("grade", verdict=verdict)


def graded(session):
    return session.log.progress()["graded"]


def is_repeat(session, item):
    return session.log.queue[item.place]["repeat_of"] is not None


def snapshot(session):
    """All that a view could show."""
    log = session.log
    return deepcopy((log.items, log.cursor, log.suggesting, log.seen, log.standing))


def start_python(folder, code):
    """Run `code` in a process of its own, where `folder` and this file's helpers are known."""
    script = f"""import sys; sys.path[:0] = {[os.getcwd(), os.path.dirname(__file__)]!r}
from pathlib import Path
from test_session import grade, graded, make_rows, open_at
folder = Path({str(folder)!r})
{code}"""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True)


# --- the queue ---


def test_single_mode_shows_each_chosen_note_once_per_system_and_never_twice_in_a_row():
    for seed in range(30):
        queue = plan_queue(make_rows(), "single", 12, seed, "")
        assert len(queue) == 12
        shown = Counter((line["item_id"], *line["systems"]) for line in queue)
        notes = {line["item_id"] for line in queue}
        assert shown == Counter({(note, system): 1 for note in notes for system in ("sft", "dpo")})
        assert all(a["item_id"] != b["item_id"] for a, b in zip(queue, queue[1:], strict=False))


def test_each_system_comes_first_or_on_the_left_equally_often_also_with_repeats():
    for mode, items in (("ab", 7), ("ab", 8), ("ab", 30), ("single", 12)):
        for seed in range(10):
            queue = plan_queue(make_rows(40), mode, items, seed, f"assessor {seed}")
            queue = add_repeats(queue, 0.3, seed)
            lefts = Counter(line["systems"][0] for line in queue)
            assert lefts["sft"] == lefts["dpo"] >= items // 2
        assert any(line["repeat_of"] is not None for line in queue)


def test_repeats_come_in_the_last_third_and_name_what_they_repeat():
    longer = add_repeats(plan_queue(make_rows(), "single", 18, 0, ""), 0.25, 0)
    repeats = [(place, s) for place, s in enumerate(longer) if s["repeat_of"] is not None]
    assert len(repeats) == 4
    for place, line in repeats:
        assert longer[line["repeat_of"]] == line | {"repeat_of": None}
        assert line["repeat_of"] < 9 and place >= 12


def test_assessors_grade_the_same_notes_in_orders_of_their_own_that_the_seed_decides(tmp_path):
    ann, bo = open_at(tmp_path, assessor="Ann"), open_at(tmp_path, assessor="Bo")
    shown = [[(e.item_id, e.summaries) for e in s.items if not is_repeat(s, e)] for s in (ann, bo)]
    assert sorted(shown[0]) == sorted(shown[1]) and shown[0] != shown[1]
    grade(ann, "supported")
    grade(bo, "hallucinated")  # side by side, each in a file of their own
    assert (graded(ann), graded(bo)) == (1, 1)
    assert open_at(tmp_path / "same", assessor="Ann").items == ann.items
    assert open_at(tmp_path / "other", assessor="Ann", seed=4).items != ann.items


def test_a_run_without_both_systems_is_named(tmp_path):
    rows = {place: row for place, row in make_rows().items() if place[1] != "dpo"}
    with pytest.raises(SessionError, match="summaries of all of sft, dpo"):
        open_at(tmp_path, rows=rows)


def test_sentences_keep_their_offsets_and_decimals_whole():
    text = "Takes 0.5 mg since May.  Dr. Lee agrees!\n\nNo fever. (Seen today.)"
    sentences = split_sentences(text)
    assert [s.text for s in sentences] == [
        "Takes 0.5 mg since May.", "Dr. Lee agrees!", "No fever.", "(Seen today.)",
    ]
    assert all(text[s.start : s.end] == s.text for s in sentences)
    assert split_sentences("") == [] and split_sentences(" \n ") == []


# --- the seal ---


def test_nothing_the_view_is_given_names_a_system(tmp_path):
    session = open_at(tmp_path)
    visible = repr(session.items) + repr(session.header) + session.path.read_text()
    assert "sft" not in visible and "dpo" not in visible


def test_the_header_holds_the_hash_of_the_blind_key(tmp_path):
    open_at(tmp_path).close()
    key = next(tmp_path.glob("*.key.json"))
    key.write_text(key.read_text().replace("sft", "dpo"))
    with pytest.raises(SessionError, match="not the one the session was sealed with"):
        open_at(tmp_path)
    key.unlink()
    with pytest.raises(SessionError, match="key.json is missing"):
        open_at(tmp_path)


def test_names_are_unsealed_only_when_all_is_graded(tmp_path):
    session = open_at(tmp_path, items=4, share=0)
    grade(session, "supported")
    with pytest.raises(SessionError, match="3 of 4 items are not graded"):
        session.unblind()
    while session.current:
        grade(session, "supported")
    names = session.unblind()
    assert Counter(name[1] for name in names) == {"sft": 2, "dpo": 2}
    for item, name in zip(session.items, names, strict=True):
        assert ("long" if name[1] == "sft" else "short") in item.summaries[0]
    for act in (lambda: session.act("show", place=0), session.undo):
        with pytest.raises(SessionError, match="would not be blind"):
            act()


# --- actions ---


def test_a_reopened_session_is_at_the_same_item_with_the_same_grades(tmp_path):
    session = open_at(tmp_path)
    session.act("note", text="clear")
    grade(session, "supported")
    session.act("label", sentence="s1", verdict="hallucinated", type="detail", severity="major")
    session.act("omit", text="allergy; age")
    grade(session, "hallucinated")
    session.act("flag", on=True)
    session.act("skip")
    before, shown = snapshot(session), session.current
    session.close()
    again = open_at(tmp_path)
    assert snapshot(again) == before and again.current == shown
    assert again.log.items[1]["labels"]["s1"]["severity"] == "major"
    assert again.log.items[1]["omissions"] == ["allergy", "age"]


def test_undo_gives_back_the_state_before_each_action_in_turn(tmp_path):
    session = open_at(tmp_path)
    states = []
    for do, values in (
        ("label", {"sentence": "s2", "verdict": "unsure"}), ("grade", {"verdict": "supported"}),
        ("flag", {"on": True}), ("skip", {}), ("note", {"text": "hm"}),
        ("grade", {"verdict": "unsure"}),
    ):  # fmt: skip
        states.append(snapshot(session))
        session.act(do, **values)
    for state in reversed(states):
        session.undo()
        assert snapshot(session) == state
    with pytest.raises(SessionError, match="nothing to undo"):
        session.undo()
    actions = [action.do for action in Log(session.path).actions]
    assert actions.count("undo") == 6 and actions.count("grade") == 2  # history is kept


def test_skipped_entries_count_as_unfinished_and_can_be_gone_back_to(tmp_path):
    session = open_at(tmp_path, items=4, share=0)
    session.act("skip")
    while session.current:
        grade(session, "supported")
    progress = session.log.progress()
    assert (progress["graded"], progress["skipped"], progress["total"]) == (3, 1, 4)
    session.act("show", place=0)
    grade(session, "unsure")
    assert graded(session) == 4 and session.current is None


def test_time_per_item_is_recorded(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    session = open_at(tmp_path)
    for seconds in (2.0, 4.0, 9.0):
        now[0] += seconds
        grade(session, "supported")
    assert session.log.progress()["seconds"] == 4.0


def test_grades_that_make_no_sense_are_refused_and_not_written(tmp_path):
    session = open_at(tmp_path)
    session.act("label", sentence="s1", verdict="hallucinated")
    for do, values, why in (
        ("grade", {"verdict": "maybe"}, "verdict"),
        ("grade", {}, "lacks its verdict"),
        ("grade", {"verdict": "general_knowledge"}, "a verdict on a sentence"),
        ("grade", {"verdict": "supported"}, "cannot be 'supported'"),
        ("label", {"sentence": "s9", "verdict": "supported"}, "no such sentence"),
        ("label", {"sentence": "s1", "verdict": "supported", "type": "detail"}, "no error type"),
        ("prefer", {"preference": 1}, "mode 'single' has no 'prefer'"),
        ("show", {"place": 99}, "no such item"),
        ("note", {"text": "\ud83d"}, "surrogates not allowed"),  # half an emoji
    ):
        with pytest.raises(SessionError, match=why):
            session.act(do, **values)
    assert len(Log(session.path).actions) == 1


def test_an_ab_item_ends_with_the_preference_and_takes_no_grade(tmp_path):
    session = open_at(tmp_path, mode="ab", items=4, share=0)
    first = session.current
    with pytest.raises(SessionError, match="mode 'ab' has no 'grade'"):
        grade(session, "hallucinated")
    session.act("prefer", preference=-1)
    assert session.current != first and graded(session) == 1


# --- the file ---


def test_a_torn_last_line_is_reported_and_the_rest_kept(tmp_path):
    session = open_at(tmp_path)
    grade(session, "supported", "hallucinated")
    session.close()
    session.path.write_bytes(session.path.read_bytes()[:-9])
    again = open_at(tmp_path)
    assert graded(again) == 1 and "torn by a crash" in again.warning
    grade(again, "unsure")
    log = Log(again.path)
    assert log.torn == 0 and log.actions[-1].verdict == "unsure"
    assert "torn" in log.actions[-2].text  # the file itself says what happened
    again.close()
    again.path.write_bytes(again.path.read_bytes().removesuffix(b"\n"))
    whole = open_at(tmp_path)  # where only the line break is missing, nothing is
    assert graded(whole) == 2 and not whole.warning
    grade(whole, "unsure")
    assert len(Log(whole.path).actions) == 4


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda lines: [*lines[:2], "{damaged\n", *lines[3:]], "Line 3 of"),
        (lambda lines: [*lines[:2], *lines[3:]], "action 2 expected, found 3"),
        (lambda lines: [*lines[:2], lines[2].replace('place": 1', 'place": 99')], "Line 3 .*such"),
        (lambda lines: [lines[0].replace('"version": 2', '"version": 9')], "Line 1 .* version 2"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_refused_by_number(tmp_path, damage, why):
    session = open_at(tmp_path)
    grade(session, "supported", "supported", "supported")
    session.close()
    lines = session.path.read_text().splitlines(keepends=True)
    session.path.write_text("".join(damage(lines)))
    with pytest.raises(SessionError, match=why):
        open_at(tmp_path)


def test_a_failed_write_leaves_the_file_and_the_state_as_they_were(tmp_path, monkeypatch):
    session = open_at(tmp_path)
    grade(session, "supported")
    before, content = snapshot(session), session.path.read_bytes()

    def no_space(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(HallulibError, match="disk is full"):
            grade(session, "hallucinated")
    assert snapshot(session) == before and session.path.read_bytes() == content
    grade(session, "hallucinated")
    assert Log(session.path).actions[-1].n == len(session.log.actions) == 2


def test_killing_the_process_while_it_writes_loses_no_finished_grade(tmp_path):
    child = start_python(tmp_path, """
session = open_at(folder, rows=make_rows(2000), items=4000)
while session.current:
    grade(session, "supported")
    print(graded(session), flush=True)
""")  # fmt: skip
    for _ in range(20):
        last = child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    last = (child.stdout.read().splitlines() or [last])[-1]
    child.wait()
    session = open_at(tmp_path, rows=make_rows(2000), items=4000)  # and its lock is free
    assert graded(session) >= int(last) >= 20
    grade(session, "unsure")


# --- whose session ---


def test_a_session_open_in_a_living_process_is_refused_and_free_after_its_death(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(session_module, "PATIENCE", 0.3)
    code = "session = open_at(folder)\ngrade(session, 'unsure')\nprint('open', flush=True)\ninput()"
    child = start_python(tmp_path, code)
    assert child.stdout.readline() == "open\n"
    with pytest.raises(SessionError, match="open in another process"):
        open_at(tmp_path)
    child.kill()
    child.wait()
    assert graded(open_at(tmp_path)) == 1


def test_running_the_cell_again_takes_over_and_the_older_view_stops_writing(tmp_path):
    older = open_at(tmp_path)
    newer = open_at(tmp_path)
    with ThreadPoolExecutor(1) as thread:  # a kernel answers its widgets in other threads
        thread.submit(grade, newer, "supported").result()
    with pytest.raises(SessionError, match="opened again elsewhere"):
        grade(older, "hallucinated")
    older.close()  # gives nothing back that is not its own
    grade(newer, "supported")
    assert graded(newer) == 2


def test_another_seed_mode_assessor_text_or_guideline_starts_a_session_of_its_own(
    tmp_path, monkeypatch
):
    first = open_at(tmp_path)
    grade(first, "supported")
    changes = [{"seed": 4}, {"mode": "ab"}, {"assessor": "Bo"}, {"items": 6}]
    changes.append({"rows": make_rows(end=" New.")})
    others = [open_at(tmp_path, **change) for change in changes]
    monkeypatch.setattr(session_module, "read_guideline", lambda: "Grade otherwise.")
    others.append(open_at(tmp_path))
    assert len({session.path for session in [first, *others]}) == 7
    assert not any(map(graded, others))


def test_one_person_is_one_assessor_however_the_name_is_typed(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Zo\u00eb B") for form in ("NFC", "NFD"))
    paths = set()
    for name in (composed, apart, composed.upper(), f"  {composed} ", "zo\u00eb  b"):
        with open_at(tmp_path, assessor=name) as session:
            grade(session, "supported")
            paths.add(session.path)
    assert len(paths) == 1 and graded(session) == 5
    assert session.header["assessor"] == composed
    assert open_at(tmp_path, assessor="Zoe B").path not in paths
