"""What the texts are like: overlap, perplexity, length, vocabulary. None of it measures truth.

A summary that copies the reference's inventions overlaps with it more, and fluent text has a low
perplexity whether or not it is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf

from hallulib.evaluation.statistics import cluster_bootstrap_ratio

ROUGES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
WINDOW = 50  # words over which distinct words are counted: the plain ratio falls with length


def measure_texts(generations: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Figures of one system's rows of generations.jsonl.

    {overlap: name -> mean with interval over the items that have a reference (an empty summary
    overlaps by 0), perplexity and token_accuracy of the references, words: quantiles of the
    length, vocabulary: figures of all summaries together}. None where nothing could be measured.
    """
    with_reference = [g for g in generations if g["reference"].strip()]
    return {
        "overlap": measure_overlap(with_reference, seed) if with_reference else None,
        "perplexity": _measure_perplexity(generations, seed),
        "token_accuracy": _ratio(generations, "reference_hits", seed),
        "words": describe_lengths([len(g["text"].split()) for g in generations]),
        "vocabulary": measure_vocabulary([g["text"] for g in generations]),
    }


def measure_overlap(rows: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, dict]:
    """ROUGE F (rouge-score, with stemming) and chrF (sacrebleu, as a share), means over items."""
    scorer = RougeScorer(list(ROUGES), use_stemmer=True)
    found: dict[str, list[float]] = {name: [] for name in (*ROUGES.values(), "chrF")}
    for row in rows:
        scores = scorer.score(row["reference"], row["text"])
        for key, name in ROUGES.items():
            found[name].append(scores[key].fmeasure)
        found["chrF"].append(sentence_chrf(row["text"], [row["reference"]]).score / 100)
    return {name: _describe(values, [1] * len(values), seed) for name, values in found.items()}


def _measure_perplexity(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any] | None:
    """exp of the mean negative log-probability of a reference token, given its prompt."""
    loss = _ratio(rows, "reference_logp", seed)
    if loss is None:
        return None
    bounds = {"value": exp(-loss["value"]), "low": exp(-loss["high"]), "high": exp(-loss["low"])}
    return loss | bounds


def _ratio(rows: Sequence[dict[str, Any]], name: str, seed: int) -> dict[str, Any] | None:
    scored = [r for r in rows if r.get("reference_tokens")]
    if not scored:
        return None
    return _describe([r[name] for r in scored], [r["reference_tokens"] for r in scored], seed)


def _describe(top: Sequence[float], bottom: Sequence[float], seed: int) -> dict[str, Any]:
    interval = cluster_bootstrap_ratio(top, bottom, seed=seed)
    return {
        "value": sum(top) / sum(bottom), "low": interval.low, "high": interval.high,
        "n": len(top), "level": interval.level, "method": "bootstrap over summaries",
    }  # fmt: skip


def describe_lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Mean and quantiles: {"mean", "p0", "p5", ..., "p100"}."""
    values = np.percentile(lengths, QUANTILES)
    quantiles = {f"p{q}": float(v) for q, v in zip(QUANTILES, values, strict=True)}
    return {"mean": float(np.mean(lengths))} | quantiles


def measure_vocabulary(texts: Sequence[str]) -> dict[str, float | None]:
    """How rich the words are: {words, distinct, mattr, distinct_pairs}.

    mattr: mean share of distinct words in every window of 50 words (Covington & McFall 2010);
    distinct_pairs: share of distinct neighbours among all (Li et al. 2016). None without words.
    """
    split = [text.lower().split() for text in texts]
    words = [word for text in split for word in text]
    pairs = [pair for text in split for pair in zip(text, text[1:], strict=False)]
    size = min(WINDOW, len(words))
    windows = [len(set(words[i : i + size])) / size for i in range(len(words) - size + 1) if size]
    return {
        "words": len(words),
        "distinct": len(set(words)),
        "mattr": float(np.mean(windows)) if windows else None,
        "distinct_pairs": len(set(pairs)) / len(pairs) if pairs else None,
    }
