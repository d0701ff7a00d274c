"""Whatever an assessor does, and wherever the process dies: replaying the file gives the state."""

import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import open_at

from hallulib.assessment.events import EventLog, Omission, SentenceGrade
from hallulib.assessment.state import SessionState

pytestmark = pytest.mark.unit

VERDICTS = ["supported", "hallucinated", "unsure"]
ACTION = st.one_of(
    st.tuples(st.just("grade"), st.sampled_from(VERDICTS)),
    st.tuples(st.just("prefer"), st.integers(-2, 2)),
    st.tuples(st.just("part"), st.sampled_from([*VERDICTS, "general_knowledge"])),
    st.tuples(st.just("left out"), st.lists(st.text(max_size=5), max_size=2)),
    st.tuples(st.just("note"), st.text(max_size=12)),  # any Unicode: line breaks, quotes, emoji
    st.tuples(st.just("flag"), st.booleans()),
    st.tuples(st.just("suggest"), st.booleans()),
    st.tuples(st.just("go to"), st.integers(0, 7)),
    st.tuples(st.sampled_from(["skip", "undo", "restart"]), st.none()),
    st.tuples(st.just("torn"), st.integers(1, 400)),
)


def snapshot(session):
    """All that a view could show."""
    state = session.state
    return deepcopy((state.entries, state.cursor, state.suggesting, state.suggested))


def act(session, action, value):
    if action == "undo":
        if session.state.last_action:
            session.undo()
    elif action == "suggest":
        session.suggest(value)
    elif action == "go to" or session.current is None:
        session.go_to(value if isinstance(value, int) and value >= 0 else 0)
    elif action == "skip":
        session.skip()
    elif action == "flag":
        session.flag(value)
    elif action == "note":
        session.note(value)
    elif action == "left out":
        session.grade_part(omissions=[Omission(text=text) for text in value])
    elif action == "prefer":
        if session.mode == "ab":
            session.prefer(value)
    elif action == "part":
        s = session.current.sentences()[-1]
        place = dict(statement_id=s.statement_id, start=s.start, end=s.end, text=s.text)
        session.grade_part(SentenceGrade(**place, verdict=value))
    else:
        session.grade(value, slot=1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["single", "ab"]), st.lists(ACTION, max_size=40))
def test_any_sequence_of_actions_deaths_and_replays_ends_in_the_same_state(mode, actions):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session = open_at(folder, mode=mode, items=8, repeat_share=0)
        history = {session.saved_events: snapshot(session)}
        for action, value in actions:
            if action in ("restart", "torn"):
                session = die_and_reopen(session, folder, mode, value, history)
            else:
                act(session, action, value)
            history[session.saved_events] = snapshot(session)
        replayed = SessionState.replay(
            mode, len(session.entries), EventLog.read(session.events_path).events
        )
        assert (replayed.entries, replayed.cursor) == (session.state.entries, session.state.cursor)


def die_and_reopen(session, folder, mode, torn, history):
    """Die, with up to `torn` bytes of the last line missing; what was whole must be back."""
    data = session.events_path.read_bytes()
    last = len(data.rstrip(b"\n")) - data.rstrip(b"\n").rfind(b"\n") - 1
    kept = session.saved_events
    if torn and kept > 1 and torn > 1:  # 1: only the line break is missing, the event is whole
        session.events_path.write_bytes(data[: -min(torn, last)])
        kept -= 1
    elif torn:
        session.events_path.write_bytes(data[:-1])
    again = open_at(folder, mode=mode, items=8, repeat_share=0)
    assert snapshot(again) == history[kept]
    assert bool(again.warnings) == (kept < session.saved_events)
    return again
