"""From event files to a result: rates per system with intervals, agreement, and what is unfinished.

Systems are named only in sums. The seal of a running session stays: nothing here tells an assessor
which summary came from which system.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from hallulib.assessment.agreement import compare_grades
from hallulib.assessment.by_sentence import rate_sentences
from hallulib.assessment.compare import compare_assessors
from hallulib.assessment.describe import describe
from hallulib.assessment.opening import SYSTEMS
from hallulib.assessment.records import (
    SessionRecord,
    choose_assessors,
    keep_current,
    read_sessions,
)
from hallulib.errors import SessionError
from hallulib.evaluation.calibration import estimate_true_rate
from hallulib.evaluation.statistics import compare_paired, estimate_proportion
from hallulib.files import sha256_text, write_json_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage

SUMMARY = "assessment/summary.json"
DETECTED = "evaluation/evaluation.jsonl"


@dataclass(frozen=True)
class AssessmentResult:
    """What the assessment shows. It rests on one session: the fullest by a person, or where no
    person has graded, the simulated one; `assessor_kind` says which ("human", "simulated").

    systems: {system, k, n, value, low, high, unsure, ...}, one per system with a definite grade.
    paired: the comparison of sft with dpo on notes graded under both, or None. by_sentence: see
    `rate_sentences`.
    detector, intra_rater: agreement as in `Agreement.to_dict()`. calibrated: per system the rate
    over all evaluated summaries, the detector corrected by these grades (PPI++). assessors: see
    `compare_assessors`. adjudicated: verdicts replaced by an adjudicator's. suggested: items graded
    with the detector's suggestions in view. sessions: every session found.
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
    by_sentence: list[dict] = field(default_factory=list)
    calibrated: list[dict] = field(default_factory=list)
    suggested: int = 0
    adjudicated: int = 0
    assessors: dict = field(default_factory=dict)
    sessions: list[dict] = field(default_factory=list)
    grades_sha256: str = ""
    notes: dict = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The result in words, every rate with its numbers, interval, unit and assessor."""
        return describe(asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> AssessmentResult:
        """Read back what `asdict` wrote."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def analyse_assessment(recipe: Recipe, run: Run) -> AssessmentResult:
    """Analyse the grades given so far and write assessment/summary.json (stage "assessment").

    Grades given since the last analysis make it run again. Raises SessionError when nobody, not
    even the scripted assessor, has graded anything.
    """
    if run.path(SUMMARY).exists():
        recorded = json.loads(run.path(SUMMARY).read_text("utf-8"))["grades_sha256"]
        if recorded != _hash_grades(read_sessions(run)):
            run.forget("assessment")
    return _analyse(recipe, run)


def load_assessment_result(run: Run) -> AssessmentResult:
    """The result as last written."""
    return AssessmentResult.from_dict(json.loads(run.require(SUMMARY).read_text("utf-8")))


@stage("assessment", load=load_assessment_result)
def _analyse(recipe: Recipe, run: Run) -> AssessmentResult:
    records = read_sessions(run)
    current = keep_current(records, run)
    assessors = choose_assessors(current)
    if not assessors:
        raise SessionError(
            "Nobody has graded a summary of this run yet.",
            "Grade some in notebook 07_assessment_widget, or let the scripted assessor do it.",
        )
    chosen = assessors[0]
    settled = find_adjudicated(current, chosen)
    verdicts = [(i, s, settled.get((i, s), v), repeat) for i, s, v, repeat in chosen.verdicts()]
    result = _summarise(chosen, verdicts, _read_detector(run.require(DETECTED)))
    result = replace(
        result, adjudicated=len(settled), grades_sha256=_hash_grades(records),
        sessions=[_list_session(record, record in current) for record in records],
        assessors=compare_assessors(choose_assessors(current, "single")),
    )
    write_json_atomic(run.path(SUMMARY), asdict(result))
    return result


def find_adjudicated(
    records: list[SessionRecord], chosen: SessionRecord
) -> dict[tuple[str, str], str]:
    """(item id, system) -> the verdict an adjudicator gave, of the same kind as the assessor."""
    return {
        (item, system): verdict
        for record in records
        if record.header.role == "adjudicate"
        and record.header.assessor_kind == chosen.header.assessor_kind
        for item, system, verdict, _ in record.verdicts()
    }


def _hash_grades(records: list[SessionRecord]) -> str:
    """sha256 of everything done in any session; opening one again does not change it."""
    return sha256_text("\n".join(record.digest for record in records))


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
    record: SessionRecord, verdicts: list[tuple[str, str, str, bool]], detector: dict
) -> AssessmentResult:
    progress = record.state.progress()
    result = AssessmentResult(
        assessor_kind=record.header.assessor_kind, assessor=record.header.assessor_id,
        session_id=record.header.session_id, mode=record.header.mode,
        total=progress.total, graded=progress.graded, skipped=progress.skipped,
        unfinished=progress.unfinished, median_seconds=progress.median_seconds,
        systems=_rate_systems(verdicts), paired=_compare_systems(verdicts),
        preferences=_count_preferences(record), detector=_compare_with_detector(verdicts, detector),
        by_sentence=rate_sentences(record), calibrated=calibrate_detector(verdicts, detector),
        intra_rater=compare_repeats(record),
        suggested=sum(e.done and p in record.state.suggested
                      for p, e in enumerate(record.state.entries)),
    )  # fmt: skip
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


def calibrate_detector(verdicts: list[tuple[str, str, str, bool]], detector: dict) -> list[dict]:
    """Per system the rate over all evaluated summaries: people's grades where there are some, the
    detector's verdict on the others (PPI++; with too few grades, people's rate alone)."""
    found = []
    for system in SYSTEMS:
        graded = {
            item: verdict == "hallucinated"
            for item, name, verdict, repeat in verdicts
            if name == system and verdict != "unsure" and not repeat
        }
        called = {i: bad for (i, name), (_, bad) in detector.items() if name == system}
        both = [item for item in graded if called.get(item) is not None]
        others = [bad for i, bad in called.items() if i not in graded and bad is not None]
        if both:
            estimate = estimate_true_rate(
                [graded[i] for i in both], [called[i] for i in both], others
            )
            found.append({"system": system, **estimate.to_dict()})
    return found


def compare_repeats(record: SessionRecord) -> dict:
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
