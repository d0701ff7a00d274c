"""Whatever an assessor does, and wherever the process dies: replaying the file gives the state."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import open_at, snapshot

pytestmark = pytest.mark.unit

VERDICTS = ["supported", "hallucinated", "unsure"]
ACTION = st.one_of(
    st.tuples(st.just("grade"), st.sampled_from(VERDICTS)),
    st.tuples(st.just("prefer"), st.integers(-2, 2)),
    st.tuples(st.just("label"), st.sampled_from([*VERDICTS, "general_knowledge"])),
    st.tuples(st.just("omit"), st.lists(st.text(max_size=5), max_size=2)),
    st.tuples(st.just("note"), st.text(max_size=12)),  # any Unicode: line breaks, quotes, emoji
    st.tuples(st.sampled_from(["flag", "suggest"]), st.booleans()),
    st.tuples(st.just("show"), st.integers(0, 7)),
    st.tuples(st.sampled_from(["skip", "undo", "restart"]), st.none()),
    st.tuples(st.just("torn"), st.integers(1, 400)),
)
ONLY = {"prefer": "ab", "grade": "single", "label": "single", "omit": "single"}


def act(session, do, value):
    wrong = any(grade["verdict"] == "hallucinated" for grade in session.said["labels"].values())
    if do == "undo":
        if session.log.standing:
            session.undo()
    elif do not in ("show", "suggest") and session.current is None:
        session.act("show", place=0)
    elif ONLY.get(do, session.header["mode"]) == session.header["mode"]:
        values = {
            "grade": {"verdict": "hallucinated" if wrong else value},
            "prefer": {"preference": value},
            "label": {"sentence": "s2", "verdict": value},
            "omit": {"text": "; ".join(value) if do == "omit" else ""},
            "note": {"text": value},
            "show": {"place": value},
            "skip": {},
        }
        session.act(do, **values.get(do, {"on": value}))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["single", "ab"]), st.lists(ACTION, max_size=40))
def test_any_sequence_of_actions_deaths_and_replays_ends_in_the_same_state(mode, actions):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session = open_at(folder, mode=mode, items=8, share=0)
        history = {len(session.log.actions): snapshot(session)}
        for action, value in [*actions, ("restart", None)]:
            if action in ("restart", "torn"):
                session = die_and_reopen(session, folder, mode, value, history)
            else:
                act(session, action, value)
            history[len(session.log.actions)] = snapshot(session)


def die_and_reopen(session, folder, mode, torn, history):
    """Die, with up to `torn` bytes of the last line missing; what was whole must be back."""
    data = session.path.read_bytes()
    last = len(data.rstrip(b"\n")) - data.rstrip(b"\n").rfind(b"\n") - 1
    kept = len(session.log.actions)
    if torn and kept and torn > 1:  # 1: only the line break is missing, the event is whole
        session.path.write_bytes(data[: -min(torn, last)])
        kept -= 1
    elif torn and kept:
        session.path.write_bytes(data[:-1])
    again = open_at(folder, mode=mode, items=8, share=0)
    assert snapshot(again) == history[kept]
    assert bool(again.warning) == (kept < len(session.log.actions))
    return again
