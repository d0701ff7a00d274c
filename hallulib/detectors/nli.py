"""An entailment model as a detector: does the note say this sentence, yes or no?

Any sequence-classification checkpoint whose config names its labels. A sentence is supported when
some part of the note entails it; a long note is read in parts, cut between sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hallulib.detectors.base import Judgement, Source, StatementVerdict
from hallulib.detectors.tokens import find_sentences
from hallulib.errors import HallulibError, RecipeError
from hallulib.files import resolve_path

# what checkpoints call their labels, in lower case and letters only
_LABELS = {
    "support": "entailment entail entailed supported supports consistent factual faithful",
    "contradiction": "contradiction contradict contradicted contradicts refuted refutes",
    "other": "neutral notentailment nonentailment unsupported notsupported inconsistent nonfactual "
             "notenoughinfo hallucinated hallucination unfaithful",
}  # fmt: skip
LONGEST = 512  # tokens; longer is possible for some models, and slower for all
Span = tuple[int, int]


class NliDetector:
    """Judges each sentence of a summary with an entailment model.

    name_or_path: a folder, or a hub id, with "@revision" if you pin one (do). threshold: the
    probability of entailment from which a sentence counts as supported. batch_size: pairs of text
    read at a time. Raises HallulibError when it cannot be loaded or has no meaning for its labels.
    """

    def __init__(
        self, name_or_path: str, threshold: float = 0.5, batch_size: int = 16, device: str = "cpu"
    ) -> None:
        if not 0 < threshold < 1:
            raise RecipeError(f"the threshold is {threshold}", "give one between 0 and 1 (0.5)")
        self.model, self.tokenizer = _load(name_or_path, device)
        self.labels = read_label_order(self.model.config.id2label)
        self.threshold, self.batch_size = threshold, batch_size
        self.name = f"nli:{name_or_path.rstrip('/')}"
        if resolve_path(name_or_path).is_dir():  # never the path of somebody's machine
            self.name = f"nli:{resolve_path(name_or_path).name}"
        positions = getattr(self.model.config, "max_position_embeddings", LONGEST)
        # RoBERTa counts positions from its padding index on, so two of them are not for use.
        self.longest = min(LONGEST, positions - 2, self.tokenizer.model_max_length)

    def judge(self, source: Source, summary: str) -> Judgement:
        spans = find_sentences(summary)
        sizes = [self._count(summary[start:end]) for start, end in spans]
        # Half of what fits is for the note; a "sentence" beyond is no sentence, and not judged.
        short = {s: n for s, n in zip(spans, sizes, strict=True) if n < self.longest / 2}
        readable = list(short)
        room = self.longest - max(short.values(), default=0) - 4
        parts = self._cut(source.text, room)
        texts = [summary[start:end] for start, end in readable]
        pairs = [(source.text[a:b], text) for text in texts for a, b in parts]
        found = self._classify(pairs).view(len(texts), len(parts), self.model.config.num_labels)
        by_span = dict(zip(readable, found, strict=True))
        statements = [self._decide(source.text, summary, span, parts, by_span.get(span))
                      for span in spans]  # fmt: skip
        return Judgement(statements, [], self.name)

    def _decide(
        self, note: str, summary: str, span: Span, parts: list[Span], found: torch.Tensor | None
    ) -> StatementVerdict:
        """The verdict on one sentence from the probabilities (parts of the note, labels)."""
        text = summary[span[0] : span[1]]
        if found is None or not len(found) or not found.isfinite().all():
            why = "the sentence is too long" if found is None else "the model gave no probability"
            return StatementVerdict(text, *span, "sentence", "unparsed", evidence=why)
        support, best = found[:, self.labels["support"]].max(0)
        score = 1 - float(support)
        if support >= self.threshold:
            spans = self._narrow(note, parts[best], text, self.labels["support"])
            return self._verdict(text, span, "supported", note, spans, score)
        if "contradiction" in self.labels:
            against, where = found[:, self.labels["contradiction"]].max(0)
            if against > max(0.5, float(support)):
                spans = self._narrow(note, parts[where], text, self.labels["contradiction"])
                return self._verdict(text, span, "contradicted", note, spans, score)
        return self._verdict(text, span, "not_in_note", note, (), score)

    @staticmethod
    def _verdict(text, span, verdict, note, spans, score) -> StatementVerdict:
        error_type = {"contradicted": "other", "not_in_note": "fabrication"}.get(verdict)
        evidence = " ".join(note[start:end] for start, end in spans)
        return StatementVerdict(
            text, *span, "sentence", verdict, error_type, evidence, spans, score
        )

    def _narrow(self, note: str, part: Span, text: str, label: int) -> tuple[Span]:
        """The one sentence of a part of the note that says most of what the part says."""
        inside = [s for s in find_sentences(note) if part[0] <= s[0] and s[1] <= part[1]]
        if len(inside) < 2:
            return (part,)
        scores = self._classify([(note[start:end], text) for start, end in inside])[:, label]
        return (inside[int(scores.nan_to_num(0).argmax())],)

    def _cut(self, note: str, room: int) -> list[Span]:
        """Cut a note into parts of at most `room` tokens, between sentences where that is possible;
        the last sentence of a part also begins the next one."""
        pieces = [p for s in find_sentences(note) for p in self._cut_sentence(note, s, room)]
        parts: list[Span] = []
        first = 0
        for place, (_, end) in enumerate(pieces):
            if place > first and self._count(note[pieces[first][0] : end]) > room:
                parts.append((pieces[first][0], pieces[place - 1][1]))
                again = note[pieces[place - 1][0] : end]
                first = place - 1 if place - 1 > first and self._count(again) <= room else place
        return [*parts, (pieces[first][0], pieces[-1][1])] if pieces else []

    def _cut_sentence(self, note: str, span: Span, room: int) -> list[Span]:
        """A sentence longer than `room` tokens, cut at tokens; others as they are."""
        coded = self.tokenizer(
            note[span[0] : span[1]], add_special_tokens=False, return_offsets_mapping=True,
            verbose=False,
        )  # fmt: skip
        offsets = coded["offset_mapping"]
        return [
            (span[0] + offsets[i][0], span[0] + offsets[min(i + room, len(offsets)) - 1][1])
            for i in range(0, len(offsets), room)
        ]

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    @torch.inference_mode()
    def _classify(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Probabilities (pairs, labels) of (part of the note, sentence) pairs."""
        rows = []
        for start in range(0, len(pairs), self.batch_size):
            notes, texts = zip(*pairs[start : start + self.batch_size], strict=True)
            batch = self.tokenizer(list(notes), list(texts), padding=True, return_tensors="pt")
            logits = self.model(**batch.to(self.model.device)).logits
            rows.append(logits.float().softmax(-1).cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.model.config.num_labels)


def read_label_order(id2label: dict[int, str]) -> dict[str, int]:
    """Which output means what: {"support": i} and, where there is one, {"contradiction": j}.

    The order differs between checkpoints, so it is read, never assumed. Raises HallulibError for
    labels like LABEL_0, which say nothing.
    """
    found: dict[str, list[int]] = {}
    for place, label in id2label.items():
        plain = re.sub("[^a-z]", "", label.lower())
        for meaning, names in _LABELS.items():
            if plain in names.split():
                found.setdefault(meaning, []).append(int(place))
    if len(found.get("support", [])) != 1 or sum(map(len, found.values())) != len(id2label):
        raise HallulibError(
            f"the labels {list(id2label.values())} do not say which one means 'supported'",
            'write what the model\'s card says into "id2label" of its config.json, with the names '
            "entailment, neutral and contradiction (or entailment and not_entailment)",
        )
    return {meaning: places[0] for meaning, places in found.items() if meaning != "other"}


def _load(name_or_path: str, device: str):
    if not name_or_path:
        raise HallulibError(
            "the nli detector has no model",
            "set evaluation.nli_model to a folder or a hub id[@revision]",
        )
    folder = resolve_path(name_or_path)
    name, _, revision = name_or_path.partition("@")
    where = {"pretrained_model_name_or_path": name, "revision": revision or "main"}
    if folder.is_dir():
        where = {"pretrained_model_name_or_path": str(folder)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForSequenceClassification.from_pretrained(**where)
    except (OSError, ValueError, ImportError) as error:
        shown = Path(folder).name if folder.is_dir() else name
        raise HallulibError(
            f"the entailment model '{shown}' cannot be loaded: {str(error).splitlines()[0]}",
            "check evaluation.nli_model: a folder, or a hub id and the network",
        ) from error
    return model.to(device).eval(), tokenizer
