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

from hallulib.rates import Rate, resample_ratio

ROUGES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
WINDOW = 50  # words over which distinct words are counted: the plain ratio falls with length


def measure_texts(generations: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Figures of one system's rows of generations.jsonl.

    {overlap: name -> mean over the items that have a reference (an empty summary overlaps by 0),
    perplexity and token_accuracy of the references, words: quantiles of the length, vocabulary: of
    all summaries together}. Each figure of references is a `Rate`'s dict, None without any.
    """
    scored = [g for g in generations if g.get("reference_tokens")]
    tokens = [g["reference_tokens"] for g in scored]
    loss = _average([-g["reference_logp"] for g in scored], tokens, "perplexity", seed)
    lengths = [len(g["text"].split()) for g in generations]
    return {
        "overlap": measure_overlap([g for g in generations if g["reference"].strip()], seed),
        "perplexity": loss and loss | {name: exp(loss[name]) for name in ("value", "low", "high")},
        "token_accuracy": _average([g["reference_hits"] for g in scored], tokens, "tokens", seed),
        "words": {f"p{q}": float(np.percentile(lengths, q)) for q in (0, 5, 25, 50, 75, 95, 100)},
        "vocabulary": measure_vocabulary([g["text"] for g in generations]),
    }


def measure_overlap(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, dict] | None:
    """ROUGE F (rouge-score, with stemming) and chrF (sacrebleu, as a share), means over items."""
    scorer = RougeScorer(list(ROUGES), use_stemmer=True)
    found: dict[str, list[float]] = {name: [] for name in (*ROUGES.values(), "chrF")}
    for row in rows:
        for key, score in scorer.score(row["reference"], row["text"]).items():
            found[ROUGES[key]].append(score.fmeasure)
        found["chrF"].append(sentence_chrf(row["text"], [row["reference"]]).score / 100)
    ones = [1] * len(rows)
    return {n: _average(found[n], ones, "overlap", seed) for n in found} if rows else None


def _average(tops: Sequence, bottoms: Sequence, unit: str, seed: int) -> dict[str, Any] | None:
    if not bottoms:
        return None
    value, bounds = float(sum(tops) / sum(bottoms)), resample_ratio(tops, bottoms, seed)
    return Rate(value, *bounds, unit, "bootstrap over summaries", n=len(tops)).to_dict()


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
