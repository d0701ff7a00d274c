"""From event files to a result: rates per system with intervals, agreement, and what is unfinished.

Systems are named only in sums. The seal of a running session stays: nothing here tells an assessor
which summary came from which system.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hallulib.assessment.agreement import compare_grades
from hallulib.assessment.describe import describe
from hallulib.assessment.events import SIMULATED, EventLog, Header
from hallulib.assessment.opening import SYSTEMS, read_generations, read_sealed_key
from hallulib.assessment.queue import (
    Slotting,
    fill_queue,
    hash_entries,
    index_rows,
)
from hallulib.assessment.state import SessionState
from hallulib.errors import SessionError
from hallulib.evaluation.statistics import compare_paired, estimate_proportion
from hallulib.paths import sha256_text, write_json_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage

SUMMARY = "assessment/summary.json"


@dataclass(frozen=True)
class SessionRecord:
    """A session as read from its files, without opening it for writing."""

    header: Header
    queue: list[Slotting]
    state: SessionState
    torn_bytes: int
    digest: str

    def verdicts(self) -> list[tuple[str, str, str, bool]]:
        """(item id, system, verdict, is a repeat) for every graded summary."""
        return [
            (slotting.item_id, slotting.systems[slot - 1], grade.verdict, bool(grade.is_repeat))
            for slotting, entry in zip(self.queue, self.state.entries, strict=True)
            for slot, grade in sorted(entry.grades.items())
            if not entry.skipped
        ]


@dataclass(frozen=True)
class AssessmentResult:
    """What the assessment shows. It rests on one session: the fullest by a person, or where no
    person has graded, the simulated one; `assessor_kind` says which ("human", "simulated").

    systems: {system, k, n, value, low, high, unsure, ...}, one per system with a definite grade.
    paired: the comparison of sft with dpo on notes graded under both, or None.
    detector, intra_rater: agreement as in `Agreement.to_dict()`. sessions: every session found.
    """

    assessor_kind: str
    assessor: str
    session_id: str
    mode: str
    total: int
    graded: int
    skipped: int
    unfinished: int
    median_seconds: float | None
    systems: list[dict]
    paired: dict | None
    preferences: dict[str, int]
    detector: dict
    intra_rater: dict
    sessions: list[dict]
    grades_sha256: str
    notes: dict = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The result in words, every rate with its numbers, interval, unit and assessor."""
        return describe(asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> AssessmentResult:
        """Read back what `asdict` wrote."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def analyse_assessment(recipe: Recipe, run: Run) -> AssessmentResult:
    """Analyse the grades given so far and write assessment/summary.json (stage "assessment").

    Grades given since the last analysis make it run again. Raises SessionError when nobody, not
    even the scripted assessor, has graded anything.
    """
    if run.path(SUMMARY).exists():
        recorded = json.loads(run.path(SUMMARY).read_text("utf-8"))["grades_sha256"]
        if recorded != _hash_grades(run.path("assessment")):
            run.forget("assessment")
    return _analyse(recipe, run)


def load_assessment_result(run: Run) -> AssessmentResult:
    """The result as last written."""
    return AssessmentResult.from_dict(json.loads(run.require(SUMMARY).read_text("utf-8")))


@stage("assessment", load=load_assessment_result)
def _analyse(recipe: Recipe, run: Run) -> AssessmentResult:
    rows = index_rows(read_generations(run.require("evaluation/generations.jsonl")))
    records = [read_session(path) for path in _event_files(run.path("assessment"))]
    current = [record for record in records if _shows_these(record, rows)]
    chosen = _choose(current)
    if chosen is None:
        raise SessionError(
            "Nobody has graded a summary of this run yet.",
            "Grade some in notebook 07_assessment_widget, or let the scripted assessor do it.",
        )
    detector = _read_detector(run.require("evaluation/evaluation.jsonl"))
    listed = [_list_session(record, record in current) for record in records]
    result = _summarise(chosen, listed, detector, _hash_grades(run.path("assessment")))
    write_json_atomic(run.path(SUMMARY), asdict(result))
    return result


def read_session(events_path: Path) -> SessionRecord:
    """Read a session's files without locking or changing them; a torn last line is left out.

    Raises SessionError when the blind key is not the one whose hash the header holds.
    """
    log = EventLog.read(events_path)
    queue = read_sealed_key(events_path, log.header)
    state = SessionState.replay(log.header.mode, len(queue), log.events)
    lines = [event.model_dump_json() for event in log.events if event.action != "open"]
    return SessionRecord(log.header, queue, state, log.torn_bytes, sha256_text("\n".join(lines)))


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.events.jsonl"))


def _hash_grades(folder: Path) -> str:
    """sha256 of everything done in any session; opening one again does not change it."""
    return sha256_text("\n".join(read_session(path).digest for path in _event_files(folder)))


def _shows_these(record: SessionRecord, rows: dict[tuple[str, str], dict]) -> bool:
    """Whether a session is about the summaries that the run holds now."""
    try:
        entries = fill_queue(record.queue, rows)
    except SessionError:
        return False
    return hash_entries(entries) == record.header.items_sha256


def _choose(records: list[SessionRecord]) -> SessionRecord | None:
    """The fullest session of a person; if no person graded anything, the fullest simulated one."""
    graded = [record for record in records if record.state.progress().graded]
    people = [record for record in graded if record.header.assessor_kind != SIMULATED]
    return max(people or graded, key=lambda r: r.state.progress().graded, default=None)


def _read_detector(path: Path) -> dict[tuple[str, str], tuple[str, bool | None]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {(str(r["id"]), r["system"]): (r["detector"], r["hallucinated"]) for r in rows}


def _list_session(record: SessionRecord, is_current: bool) -> dict:
    progress = record.state.progress()
    return {
        "session_id": record.header.session_id,
        "assessor": record.header.assessor_id,
        "assessor_kind": record.header.assessor_kind,
        "mode": record.header.mode,
        "current": is_current,  # False: about summaries that have been generated anew since
        "total": progress.total,
        "graded": progress.graded,
        "skipped": progress.skipped,
        "flagged": progress.flagged,
        "torn_bytes": record.torn_bytes,
    }


def _summarise(
    record: SessionRecord, listed: list[dict], detector: dict, grades_sha256: str
) -> AssessmentResult:
    progress = record.state.progress()
    verdicts = record.verdicts()
    result = AssessmentResult(
        assessor_kind=record.header.assessor_kind, assessor=record.header.assessor_id,
        session_id=record.header.session_id, mode=record.header.mode,
        total=progress.total, graded=progress.graded, skipped=progress.skipped,
        unfinished=progress.unfinished, median_seconds=progress.median_seconds,
        systems=_rate_systems(verdicts), paired=_compare_systems(verdicts),
        preferences=_count_preferences(record), detector=_compare_with_detector(verdicts, detector),
        intra_rater=_compare_repeats(record), sessions=listed, grades_sha256=grades_sha256,
    )
    notes = {"assessor_kind": result.assessor_kind, "graded": f"{result.graded}/{result.total}"}
    notes |= {f"rate_{rate['system']}": rate["value"] for rate in result.systems}
    result.notes.update(notes)
    return result


def _rate_systems(verdicts: list[tuple[str, str, str, bool]]) -> list[dict]:
    """Share of hallucinated summaries per system. Repeats count once, unsure ones are set apart."""
    rates = []
    for system in SYSTEMS:
        own = [verdict for _, name, verdict, repeat in verdicts if name == system and not repeat]
        definite = [verdict for verdict in own if verdict != "unsure"]
        if definite:
            rate = estimate_proportion(definite.count("hallucinated"), len(definite), "summary")
            unsure = len(own) - len(definite)
            rates.append({"system": system, **rate.to_dict(), "unsure": unsure})
    return rates


def _compare_systems(verdicts: list[tuple[str, str, str, bool]]) -> dict | None:
    """The two systems on notes that have a definite grade under both; None without such notes."""
    bad = {
        (item, system): verdict == "hallucinated"
        for item, system, verdict, repeat in verdicts
        if verdict != "unsure" and not repeat
    }
    both = [item for item, system in bad if system == "sft" and (item, "dpo") in bad]
    if not both:
        return None
    return compare_paired([bad[i, "sft"] for i in both], [bad[i, "dpo"] for i in both]).to_dict()


def _count_preferences(record: SessionRecord) -> dict[str, int]:
    """Mode ab: entries in which a system was preferred, and ties; repeats count once."""
    counts = dict.fromkeys((*SYSTEMS, "tie"), 0)
    for slotting, entry in zip(record.queue, record.state.entries, strict=True):
        if record.header.mode == "ab" and entry.done and slotting.repeat_of is None:
            value = entry.preference.preference
            counts["tie" if value == 0 else slotting.systems[0 if value < 0 else 1]] += 1
    return counts


def _compare_with_detector(verdicts: list[tuple[str, str, str, bool]], detector: dict) -> dict:
    """Agreement on "hallucinated, yes or no" where both are definite; the others are counted."""
    pairs, name, left_out = [], "", 0
    for item, system, verdict, repeat in verdicts:
        name, called = detector.get((item, system), (name, None))
        if repeat:
            continue
        if verdict == "unsure" or called is None:
            left_out += 1
        else:
            pairs.append((verdict == "hallucinated", called))
    agreement = compare_grades([p[0] for p in pairs], [p[1] for p in pairs])
    return agreement.to_dict() | {"detector": name, "left_out": left_out}


def _compare_repeats(record: SessionRecord) -> dict:
    """The assessor against themselves, on entries that were shown twice."""
    first, second = [], []
    for slotting, again in zip(record.queue, record.state.entries, strict=True):
        before = None if slotting.repeat_of is None else record.state.entries[slotting.repeat_of]
        if before and before.done and again.done:
            first.append(_answer(before))
            second.append(_answer(again))
    return compare_grades(first, second).to_dict()


def _answer(entry) -> str | int:
    return entry.preference.preference if entry.mode == "ab" else entry.grades[1].verdict
