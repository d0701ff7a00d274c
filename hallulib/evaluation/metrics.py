"""From verdicts to numbers: every rate with its unit, denominator and interval.

The primary metric is `hallucination_rate@summary`: summaries with at least one hallucinated
statement, of those in which at least one statement could be read. It never stands alone: answer
rate, omissions, length and unreadable statements stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from statsmodels.stats.contingency_tables import cochrans_q
from statsmodels.stats.multitest import multipletests

from hallulib.detectors import Judgement
from hallulib.rates import Rate, compare_paired, rate, ratio

PRIMARY = "hallucination_rate@summary"
# A guardrail turns red when the second system is worse than the first by more than this.
GUARDRAIL_LIMITS = {
    "omission_rate": 0.02,  # share of the note's facts, absolute
    "answer_rate": 0.01,  # share of summaries, absolute
    "unparsed_statement_rate": 0.02,  # share of statements, absolute
    "mean_words": 0.15,  # relative
}
# What happened to an item, by whether it was hallucinated before and after.
CHANGES = {
    (True, False): "fixed", (False, True): "broken", (True, True): "both_bad",
    (False, False): "both_good",
}  # fmt: skip

Record = dict[str, Any]


def make_record(generation: Record, judgement: Judgement) -> Record:
    """One row of evaluation.jsonl: a generated summary with its verdicts and counts.

    `hallucinated` is None (not False) for a summary in which nothing could be read.
    """
    kept = ("id", "group_id", "style", "style_group", "system", "n_tokens", "finish_reason")
    return {name: generation[name] for name in kept} | {
        "detector": judgement.detector,
        "answered": judgement.answered,
        "hallucinated": judgement.hallucinated,
        "score": judgement.score,
        "n_statements": len(judgement.statements),
        "n_errors": judgement.errors,
        "n_unparsed": judgement.unparsed,
        "n_stated": judgement.stated,
        "stated_unit": judgement.stated_unit,
        "n_words": len(generation["text"].split()),
        "n_omitted": len(judgement.omissions),
        "omissions": list(judgement.omissions),
        "statements": [statement.to_dict() for statement in judgement.statements],
    }


def build_summary(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """The figures of summary.json: {primary, n, detector, systems, comparisons, all_systems,
    guardrails, by_style (style group -> system -> figures; empty where styles are not known)}.

    Raises ValueError where the systems were not evaluated on the same items, once each.
    """
    frame = pd.DataFrame(records)
    verdicts = pivot_verdicts(frame)
    systems = _summarise_groups(frame, seed)
    pairs = choose_comparisons(list(systems))
    styles = sorted(filter(None, frame["style_group"].unique()), reverse=True)
    return {
        "primary": PRIMARY,
        "n": len(verdicts),
        "detector": records[0]["detector"],
        "systems": systems,
        "comparisons": compare_pairs(verdicts, pairs),
        "all_systems": compare_together(verdicts),
        "guardrails": [g for a, b in pairs if a != "base" for g in check_guardrails(a, b, systems)],
        "by_style": {
            style: _summarise_groups(frame[frame["style_group"] == style], seed) for style in styles
        },
    }


def _summarise_groups(frame: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    return {name: summarise_system(own, seed) for name, own in frame.groupby("system", sort=False)}


def pivot_verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Whether each item (row) is hallucinated under each system (column), NaN where nothing could
    be read. Raises ValueError where the systems were not evaluated on the same items, once each."""
    if frame.groupby("system")["id"].agg(lambda ids: tuple(sorted(ids))).nunique() > 1:
        raise ValueError("the systems were not evaluated on the same items, once each")
    wide = frame.pivot(index="id", columns="system", values="hallucinated")
    return wide[frame["system"].unique()]


def summarise_system(frame: pd.DataFrame, seed: int) -> dict[str, Any]:
    """All figures of one system: plain numbers, and under "rates" each rate as a `Rate`'s dict
    (None where its n is 0). hallucination_rate and interval are those of the primary metric."""
    rates = measure_rates(frame, seed)
    values = {name: found and found.value for name, found in rates.items()}
    primary = rates[PRIMARY]
    return {
        "n": len(frame),
        "answered": int(frame["answered"].sum()),
        "hallucinated": int(frame["hallucinated"].eq(True).sum()),
        "hallucination_rate": values[PRIMARY],
        "interval": [primary.low, primary.high] if primary else [None, None],
        **{name: value for name, value in values.items() if "@" not in name},
        "unparsed_statements": int(frame["n_unparsed"].sum()),
        "mean_words": float(frame["n_words"].mean()),
        "truncated": int(frame["finish_reason"].eq("length").sum()),
        "rates": {name: found and found.to_dict() for name, found in rates.items()},
    }


def measure_rates(frame: pd.DataFrame, seed: int) -> dict[str, Rate | None]:
    """Every rate of one system. suspect_rate counts what cannot be read, too. Rates of statements
    and facts are pooled, and documents are resampled; omission_rate is of all that should be said,
    and an empty summary lacks all of it."""
    wrong, answered = frame["hallucinated"].eq(True), frame["answered"]
    counts = ["n_errors", "n_unparsed", "n_statements", "n_omitted", "n_stated"]
    documents = frame.groupby("group_id", sort=False)[counts].sum()
    errors, unparsed, statements, omitted, stated = (documents[name] for name in counts)
    unit = frame.loc[frame["n_stated"].idxmax(), "stated_unit"]
    suspect = wrong | ~answered | frame["n_unparsed"].gt(0)
    return {
        PRIMARY: rate(wrong[answered].sum(), answered.sum(), "answered summaries"),
        "hallucination_rate@all": rate(wrong.sum(), len(frame), "summaries"),
        "suspect_rate@summary": rate(suspect.sum(), len(frame), "summaries"),
        "answer_rate": rate(answered.sum(), len(frame), "summaries"),
        "statement_rate": ratio(errors, statements, "statements", seed),
        "unparsed_statement_rate": ratio(unparsed, statements, "statements", seed),
        "omission_rate": ratio(omitted, stated, unit, seed),
    }


def choose_comparisons(systems: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that are compared, declared before looking: each step of the training, and each
    other arm against SFT before it and against DPO beside it."""
    arms = [name for name in systems if name not in ("base", "sft", "dpo")]
    pairs = [("base", "sft"), ("sft", "dpo")]
    pairs += [pair for arm in arms for pair in (("sft", arm), (arm, "dpo"))]
    return [(a, b) for a, b in pairs if a in systems and b in systems]


def compare_pairs(verdicts: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One entry per pair: {a, b, n_excluded: items that one of them did not answer, paired: as
    `compare_paired` returns it, with p_holm: p among all pairs (Holm 1979); None without items}."""
    found = []
    for a, b in pairs:
        both = verdicts[[a, b]].dropna()
        paired = compare_paired(both[a], both[b]) if len(both) else None
        excluded = len(verdicts) - len(both)
        found.append({"a": a, "b": b, "n_excluded": excluded, "paired": paired})
    if made := [entry["paired"] for entry in found if entry["paired"]]:
        adjusted = multipletests([paired["p"] for paired in made], method="holm")[1]
        for paired, p in zip(made, adjusted.tolist(), strict=True):
            paired["p_holm"] = p
    return found


def compare_together(verdicts: pd.DataFrame) -> dict[str, Any] | None:
    """Do the systems differ at all? Cochran's Q over the items that every system answered:
    {systems, n, n_excluded, q, p}; None without items."""
    answered = verdicts.dropna().astype(int)
    if answered.empty:
        return None
    varies = answered.nunique(axis=1).gt(1).any()  # if not, Q would be 0 / 0
    q, p, _ = cochrans_q(answered) if varies else (0, 1, 0)
    counts = {"n": len(answered), "n_excluded": len(verdicts) - len(answered)}
    return {"systems": [*verdicts], **counts, "q": float(q), "p": float(p)}


def check_guardrails(a: str, b: str, systems: dict[str, dict]) -> list[dict[str, Any]]:
    """Did system b buy a lower rate? One entry per guardrail: {name, a, b, before, after, change,
    limit, ok}. `change` is positive when b is worse; relative for mean_words, else absolute."""
    entries = []
    for name, limit in GUARDRAIL_LIMITS.items():
        before, after = systems[a][name], systems[b][name]
        if before is None or after is None:
            continue
        change = before - after if name in ("answer_rate", "mean_words") else after - before
        if name == "mean_words":
            change = change / before if before else 0.0
        entries.append({
            "name": name, "a": a, "b": b, "before": before, "after": after, "change": change,
            "limit": limit, "ok": change <= limit,
        })  # fmt: skip
    return entries


def find_changed_items(records: Sequence[Record], a: str, b: str) -> dict[str, list[str]]:
    """Ids by what happened from system a to b: {fixed, broken, both_bad, both_good}, and
    "unanswered" where one of them gave nothing that could be read."""
    found: dict[str, list[str]] = {name: [] for name in (*CHANGES.values(), "unanswered")}
    for item, before, after in pivot_verdicts(pd.DataFrame(records))[[a, b]].itertuples():
        found[CHANGES.get((before, after), "unanswered")].append(item)
    return found
