"""The assessment session: blinded queue, append-only events, crashes, locks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import psutil
import pytest

from hallulib.assessment import opening
from hallulib.assessment.events import EventLog, Omission, SentenceGrade
from hallulib.assessment.queue import add_repeats, index_rows, plan_queue, split_sentences
from hallulib.assessment.session import SYSTEMS, AssessmentSession, SessionSettings
from hallulib.errors import HallulibError, SessionError

pytestmark = pytest.mark.unit

SETTINGS = SessionSettings("Dr A", mode="single", items=12, repeat_share=0.25, seed=3)


def make_rows(notes=9):
    return [
        {
            "id": f"n{number}",
            "system": system,
            "context": f"Note {number}: no fever & BP < 120.",
            "text": f"Patient {number} is well. Takes 0.5 mg ({style}).",
        }
        for number in range(notes)
        for system, style in (("base", "plain"), ("sft", "long"), ("dpo", "short"))
    ]


def open_at(folder, **changes):
    return AssessmentSession(folder, make_rows(), replace(SETTINGS, **changes))


def snapshot(session):
    """All that a view could show."""
    return deepcopy(session.state.entries), session.state.cursor


def sentence_grade(session, verdict="hallucinated", **fields):
    s = session.current.sentences()[0]
    return SentenceGrade(
        statement_id=s.statement_id, start=s.start, end=s.end, text=s.text, verdict=verdict,
        **fields,
    )


def test_the_same_seed_gives_the_same_queue_and_another_seed_another(tmp_path):
    first, same = open_at(tmp_path / "a"), open_at(tmp_path / "b")
    other = open_at(tmp_path / "c", seed=4)
    assert first.entries == same.entries
    assert first.entries != other.entries


def test_single_mode_shows_each_chosen_note_once_per_system_and_never_twice_in_a_row():
    for seed in range(30):
        queue = plan_queue(index_rows(make_rows()), SYSTEMS, "single", 12, seed)
        assert len(queue) == 12
        shown = Counter((slotting.item_id, *slotting.systems) for slotting in queue)
        notes = {slotting.item_id for slotting in queue}
        assert shown == Counter({(note, system): 1 for note in notes for system in SYSTEMS})
        assert all(a.item_id != b.item_id for a, b in zip(queue, queue[1:], strict=False))


def test_ab_mode_puts_each_system_on_the_left_equally_often_also_with_repeats():
    rows = index_rows(make_rows(40))
    for seed in range(10):
        for items in (7, 8, 30):
            queue = plan_queue(rows, SYSTEMS, "ab", items, seed, f"assessor {seed}")
            queue = add_repeats(queue, 0.3, seed)
            lefts = Counter(slotting.systems[0] for slotting in queue)
            assert lefts["sft"] == lefts["dpo"] >= items // 2
    assert any(slotting.repeat_of is not None for slotting in queue)


def test_assessors_grade_the_same_notes_in_orders_of_their_own(tmp_path):
    ann, bo = open_at(tmp_path, assessor="Ann"), open_at(tmp_path, assessor="Bo")
    shown = [[(e.item_id, e.summaries) for e in s.entries if not e.is_repeat] for s in (ann, bo)]
    assert sorted(shown[0]) == sorted(shown[1]) and shown[0] != shown[1]
    ann.grade("supported")
    bo.grade("hallucinated")  # side by side, each in a file of their own
    assert (ann.progress.graded, bo.progress.graded) == (1, 1)


def test_repeats_come_in_the_last_third_and_name_what_they_repeat():
    queue = plan_queue(index_rows(make_rows()), SYSTEMS, "single", 18, 0)
    longer = add_repeats(queue, 0.25, 0)
    repeats = [(place, s) for place, s in enumerate(longer) if s.repeat_of is not None]
    assert len(repeats) == 4
    for place, slotting in repeats:
        original = longer[slotting.repeat_of]
        assert (original.item_id, original.systems) == (slotting.item_id, slotting.systems)
        assert original.repeat_of is None and slotting.repeat_of < 9 and place >= 12


def test_nothing_the_view_is_given_names_a_system(tmp_path):
    session = open_at(tmp_path)
    visible = repr(session.entries) + repr(session.header) + session.events_path.read_text()
    assert "sft" not in visible and "dpo" not in visible


def test_the_header_holds_the_hash_of_the_blind_key(tmp_path):
    session = open_at(tmp_path)
    session.close()
    key = next(tmp_path.glob("*.blind_key.json"))
    key.write_text(key.read_text().replace("sft", "dpo"))
    with pytest.raises(SessionError, match="not the one the session was sealed with"):
        open_at(tmp_path)


def test_a_missing_blind_key_is_named(tmp_path):
    open_at(tmp_path).close()
    next(tmp_path.glob("*.blind_key.json")).unlink()
    with pytest.raises(SessionError, match="blind_key.json is missing"):
        open_at(tmp_path)


def test_a_reopened_session_is_at_the_same_item_with_the_same_grades(tmp_path):
    session = open_at(tmp_path)
    session.grade("supported", note="clear")
    wrong = sentence_grade(session, type="detail", severity="major", note="dose")
    session.grade("hallucinated", [wrong], [Omission(text="allergy", severity="major")])
    session.flag()
    session.skip()
    before, shown = snapshot(session), session.current
    session.close()
    again = open_at(tmp_path)
    assert snapshot(again) == before and again.current == shown
    assert again.state.entries[1].grades[1].labels == (wrong,)
    assert again.state.entries[1].grades[1].omissions[0].text == "allergy"


def test_undo_gives_back_the_state_before_each_action_in_turn(tmp_path):
    session = open_at(tmp_path)
    states = []
    for act in (
        lambda: session.grade("supported"), lambda: session.flag(), session.skip,
        lambda: session.note("hm"), lambda: session.grade("unsure"),
    ):
        states.append(snapshot(session))
        act()
    for state in reversed(states):
        session.undo()
        assert snapshot(session) == state
    with pytest.raises(SessionError, match="nothing to undo"):
        session.undo()
    actions = [event.action for event in EventLog.read(session.events_path).events]
    assert actions.count("undo") == 5 and actions.count("grade") == 2  # history is kept


def test_a_torn_last_line_is_reported_and_the_rest_kept(tmp_path):
    session = open_at(tmp_path)
    session.grade("supported")
    session.grade("hallucinated")
    session.close()
    whole = session.events_path.read_bytes()
    session.events_path.write_bytes(whole[:-9])
    again = open_at(tmp_path)
    assert again.progress.graded == 1
    assert "torn by a crash" in again.warnings[0]
    again.grade("unsure")
    log = EventLog.read(again.events_path)
    assert log.torn_bytes == 0 and log.events[-1].verdict == "unsure"
    assert "torn" in log.events[-2].note  # the file itself says what happened


def test_a_last_line_that_lacks_only_its_line_break_is_kept(tmp_path):
    session = open_at(tmp_path)
    session.grade("supported")
    session.close()
    session.events_path.write_bytes(session.events_path.read_bytes().removesuffix(b"\n"))
    again = open_at(tmp_path)
    assert again.progress.graded == 1 and not again.warnings
    again.grade("unsure")
    assert len(EventLog.read(again.events_path).events) == 4


def test_a_damaged_line_in_the_middle_is_refused_by_number(tmp_path):
    session = open_at(tmp_path)
    session.grade("supported")
    session.grade("supported")
    session.close()
    lines = session.events_path.read_text().splitlines(keepends=True)
    session.events_path.write_text("".join([*lines[:2], "{damaged\n", *lines[3:]]))
    with pytest.raises(SessionError, match="Line 3 of"):
        open_at(tmp_path)
    session.events_path.write_text("".join([*lines[:2], *lines[3:]]))
    with pytest.raises(SessionError, match="event 2 expected, found 3"):
        open_at(tmp_path)


def test_killing_the_process_while_it_writes_loses_no_finished_grade(tmp_path):
    script = f"""
        import sys; sys.path.insert(0, {os.getcwd()!r})
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        from test_session import AssessmentSession, SETTINGS, make_rows, replace
        rows = make_rows(2000)
        settings = replace(SETTINGS, items=4000)
        session = AssessmentSession(Path({str(tmp_path)!r}), rows, settings)
        while session.current:
            session.grade("supported")
            print(session.progress.graded, flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(20):
        last = child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    last = (child.stdout.read().splitlines() or [last])[-1]
    child.wait()
    settings = replace(SETTINGS, items=4000)
    session = AssessmentSession(tmp_path, make_rows(2000), settings)  # and the lock is taken over
    assert session.progress.graded >= int(last) >= 20
    session.grade("unsure")


def test_a_second_process_cannot_write_the_session(tmp_path):
    session = open_at(tmp_path)
    lock = next(tmp_path.glob("*.lock"))
    owner = json.loads(lock.read_text())
    parent = psutil.Process().parent()
    elsewhere = {"pid": parent.pid, "started": parent.create_time(), "token": "other"}
    lock.write_text(json.dumps(owner | elsewhere))
    with pytest.raises(SessionError, match=f"open in process {parent.pid}"):
        open_at(tmp_path)
    with pytest.raises(SessionError, match="opened again elsewhere"):
        session.grade("supported")
    assert lock.exists()


def test_a_session_open_in_a_living_process_is_refused_and_free_after_its_death(tmp_path):
    script = f"""
        import sys; sys.path.insert(0, {os.getcwd()!r})
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        from test_session import open_at
        session = open_at(Path({str(tmp_path)!r}))
        session.grade("unsure")
        print("open", flush=True)
        input()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    assert child.stdout.readline() == "open\n"
    with pytest.raises(SessionError, match=f"open in process {child.pid}"):
        open_at(tmp_path)
    child.kill()
    child.wait()
    assert open_at(tmp_path).progress.graded == 1


def test_a_lock_on_another_machine_is_respected(tmp_path):
    open_at(tmp_path)
    lock = next(tmp_path.glob("*.lock"))
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "elsewhere"}))
    with pytest.raises(SessionError, match="on elsewhere"):
        open_at(tmp_path)


def test_a_lock_whose_process_number_was_given_to_another_is_taken_over(tmp_path):
    open_at(tmp_path)
    lock = next(tmp_path.glob("*.lock"))
    stale = json.loads(lock.read_text()) | {"pid": os.getppid(), "started": 1.0}
    lock.write_text(json.dumps(stale))
    open_at(tmp_path).grade("supported")


def test_running_the_cell_again_takes_over_and_the_older_view_stops_writing(tmp_path):
    older = open_at(tmp_path)
    newer = open_at(tmp_path)
    newer.grade("supported")
    with pytest.raises(SessionError, match="opened again elsewhere"):
        older.grade("hallucinated")
    older.close()  # gives nothing back that is not its own
    newer.grade("supported")


def test_a_failed_write_leaves_the_file_and_the_state_as_they_were(tmp_path, monkeypatch):
    session = open_at(tmp_path)
    session.grade("supported")
    before, content = snapshot(session), session.events_path.read_bytes()

    def no_space(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(HallulibError, match="disk is full"):
            session.grade("hallucinated")
    assert snapshot(session) == before and session.events_path.read_bytes() == content
    session.grade("hallucinated")
    assert EventLog.read(session.events_path).events[-1].seq == session.saved_events == 3


def test_summaries_generated_anew_start_a_session_of_their_own(tmp_path):
    first = open_at(tmp_path)
    first.grade("supported")
    changed = [row | {"text": row["text"] + " New."} for row in make_rows()]
    second = AssessmentSession(tmp_path, changed, SETTINGS)
    assert second.session_id != first.session_id and second.progress.graded == 0


def test_another_guideline_starts_a_session_of_its_own(tmp_path, monkeypatch):
    first = open_at(tmp_path)
    first.close()
    monkeypatch.setattr(opening, "read_guideline", lambda: "Grade otherwise.")
    other = open_at(tmp_path)
    assert other.session_id != first.session_id


def test_a_named_session_refuses_other_summaries_and_other_settings(tmp_path):
    open_at(tmp_path, name="round-1").close()
    changed = [row | {"text": row["text"] + " New."} for row in make_rows()]
    with pytest.raises(SessionError, match="items_sha256"):
        AssessmentSession(tmp_path, changed, replace(SETTINGS, name="round-1"))
    with pytest.raises(SessionError, match="its seed is 3, now it would be 4"):
        open_at(tmp_path, name="round-1", seed=4)


def test_a_session_name_cannot_leave_the_folder(tmp_path):
    for name in ("../x", "a/b", "", ".hidden", "a" * 101):
        if name:
            with pytest.raises(SessionError, match="not a session name"):
                open_at(tmp_path, name=name)


def test_names_are_unsealed_only_when_all_is_graded_or_by_force(tmp_path):
    session = open_at(tmp_path, items=4, repeat_share=0)
    session.grade("supported")
    with pytest.raises(SessionError, match="3 of 4 entries are not graded"):
        session.unblind()
    while session.current:
        session.grade("supported")
    names = session.unblind()
    assert Counter(name[1] for name in names) == {"sft": 2, "dpo": 2}
    for entry, name in zip(session.entries, names, strict=True):
        assert ("long" if name[1] == "sft" else "short") in entry.summaries[0]
    for act in (lambda: session.go_to(0), session.undo):
        with pytest.raises(SessionError, match="would not be blind"):
            act()


def test_skipped_entries_count_as_unfinished_and_can_be_gone_back_to(tmp_path):
    session = open_at(tmp_path, items=4, repeat_share=0)
    session.skip()
    while session.current:
        session.grade("supported")
    assert (session.progress.graded, session.progress.skipped) == (3, 1)
    assert session.progress.unfinished == 1
    session.go_to(0)
    session.grade("unsure")
    assert session.progress.unfinished == 0 and session.current is None


def test_time_per_item_is_recorded(tmp_path):
    now = [100.0]
    session = AssessmentSession(tmp_path, make_rows(), SETTINGS, clock=lambda: now[0])
    for seconds in (2.0, 4.0, 9.0):
        now[0] += seconds
        session.grade("supported")
    assert session.progress.median_seconds == 4.0
    assert session.progress.remaining_seconds == 4.0 * (len(session.entries) - 3)


def test_grades_that_make_no_sense_are_refused_and_not_written(tmp_path):
    session = open_at(tmp_path)
    saved = session.saved_events
    with pytest.raises(SessionError, match="verdict"):
        session.grade("maybe")
    with pytest.raises(SessionError, match="cannot be 'supported'"):
        session.grade("supported", [sentence_grade(session)])
    with pytest.raises(SessionError, match="is not in the summary"):
        shifted = sentence_grade(session).model_copy(update={"start": 1})
        session.grade("hallucinated", [shifted])
    with pytest.raises(ValueError, match="no error type"):
        sentence_grade(session, verdict="supported", type="detail")
    with pytest.raises(SessionError, match="one summary at a time"):
        session.prefer(1)
    assert session.saved_events == saved


def test_an_ab_entry_ends_with_the_preference_not_with_a_grade(tmp_path):
    session = open_at(tmp_path, mode="ab", items=4, repeat_share=0)
    first = session.current
    session.grade("hallucinated", slot=2)
    assert session.current == first
    session.prefer(-1)
    assert session.current != first and session.progress.graded == 1


def test_a_file_of_a_newer_version_is_refused(tmp_path):
    session = open_at(tmp_path)
    session.close()
    text = session.events_path.read_text()
    session.events_path.write_text(text.replace('"schema_version":1', '"schema_version":9', 1))
    with pytest.raises(SessionError, match="schema version 9 is not known"):
        open_at(tmp_path)


def test_sentences_keep_their_offsets_and_decimals_whole():
    text = "Takes 0.5 mg t.i.d. since May.  Dr. Lee agrees!\n\nNo fever. (Seen today.)"
    sentences = split_sentences(text)
    assert [s.text for s in sentences] == [
        "Takes 0.5 mg t.i.d. since May.", "Dr. Lee agrees!", "No fever.", "(Seen today.)",
    ]
    assert all(text[s.start : s.end] == s.text for s in sentences)
    assert split_sentences("") == [] and split_sentences(" \n ") == []


def test_two_rows_of_one_item_and_system_are_named(tmp_path):
    with pytest.raises(SessionError, match="'n0' of system 'base' twice"):
        AssessmentSession(tmp_path, [*make_rows(), make_rows()[0]], SETTINGS)


def test_a_run_without_both_systems_is_named(tmp_path):
    rows = [row for row in make_rows() if row["system"] != "dpo"]
    with pytest.raises(SessionError, match="summaries of all of sft, dpo"):
        AssessmentSession(tmp_path, rows, SETTINGS)
