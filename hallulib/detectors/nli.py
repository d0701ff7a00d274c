"""An entailment model as a detector: does the note say this sentence, yes or no?

Any sequence-classification checkpoint whose config names its labels. A sentence is supported when
some part of the note entails it; a long note is read in parts, cut between sentences.
"""

from __future__ import annotations

import re
from bisect import bisect_right

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hallulib.detectors.base import Judgement, Source, StatementVerdict
from hallulib.detectors.tokens import find_sentences
from hallulib.errors import HallulibError
from hallulib.files import resolve_path

# what checkpoints call their labels, in lower case and letters only
_LABELS = {
    "support": "entailment entail entailed supported supports consistent factual faithful",
    "contradiction": "contradiction contradict contradicted contradicts refuted refutes",
    "other": "neutral notentailment nonentailment unsupported notsupported inconsistent nonfactual "
             "notenoughinfo hallucinated hallucination unfaithful",
}  # fmt: skip
_LONGEST = 512  # tokens; longer is possible for some models, and slower for all
_BATCH = 16  # pairs of text read at a time
Span = tuple[int, int]


class NliDetector:
    """Judges each sentence of a summary; supported is what the model holds for likely (0.5).

    name_or_path: a folder, or a hub id, with "@revision" if you pin one (do).
    """

    def __init__(self, name_or_path: str, device: str = "cpu") -> None:
        self.model, self.tokenizer, shown = _load(name_or_path, device)
        self.name, self.labels = f"nli:{shown}", read_label_order(self.model.config.id2label)
        positions = getattr(self.model.config, "max_position_embeddings", _LONGEST)
        # RoBERTa counts positions from its padding index on, so two of them are not for use.
        self.longest = min(_LONGEST, positions - 2, self.tokenizer.model_max_length)

    def judge(self, source: Source, summary: str) -> Judgement:
        note, spans = source.text, find_sentences(summary)
        sizes = {span: len(self._read_offsets(summary[slice(*span)])) for span in spans}
        # Half of what fits is for the note; a "sentence" beyond is no sentence, and not judged.
        short = [span for span in spans if sizes[span] < self.longest / 2]
        room = self.longest - max((sizes[span] for span in short), default=0) - 4
        parts = _cut_note(note, self._read_offsets(note), room)
        pairs = [(note[a:b], summary[slice(*span)]) for span in short for a, b in parts]
        found = self._classify(pairs).view(len(short), len(parts), self.model.config.num_labels)
        verdicts = dict.fromkeys(spans, ("unparsed", None, "the sentence is too long"))
        for span, probabilities in zip(short, found, strict=True):
            verdicts[span] = self._decide(note, summary[slice(*span)], parts, probabilities)
        statements = [
            StatementVerdict(summary[slice(*span)], *span, "sentence", *verdict)
            for span, verdict in verdicts.items()
        ]
        return Judgement(statements, [], self.name)

    def _decide(self, note: str, text: str, parts: list[Span], found: torch.Tensor) -> tuple:
        """(verdict, error type, evidence, its places, score) of one sentence, from probabilities
        (parts of the note, labels)."""
        if not len(found) or not found.isfinite().all():
            return "unparsed", None, "the model gave no probability"
        best = {meaning: float(found[:, label].max()) for meaning, label in self.labels.items()}
        score = 1 - best["support"]
        if best["support"] >= 0.5:
            verdict, error_type, label = "supported", None, self.labels["support"]
        elif best.get("contradiction", 0) > 0.5:
            verdict, error_type, label = "contradicted", "other", self.labels["contradiction"]
        else:
            return "not_in_note", "fabrication", "", (), score
        place = self._narrow(note, text, parts[int(found[:, label].argmax())], label)
        return verdict, error_type, note[slice(*place)], (place,), score

    def _narrow(self, note: str, text: str, part: Span, label: int) -> Span:
        """The one sentence of a part of the note that says most of what the part says."""
        inside = [s for s in find_sentences(note) if part[0] <= s[0] and s[1] <= part[1]] or [part]
        scores = self._classify([(note[start:end], text) for start, end in inside])[:, label]
        return inside[int(scores.nan_to_num(0).argmax())]

    def _read_offsets(self, text: str) -> list[Span]:
        """Where the tokens of a text stand."""
        return self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]

    @torch.inference_mode()
    def _classify(self, pairs: list[tuple[str, str]]) -> torch.Tensor:
        """Probabilities (pairs, labels) of (part of the note, sentence) pairs."""
        rows = [torch.empty(0, self.model.config.num_labels)]
        for start in range(0, len(pairs), _BATCH):
            notes, texts = map(list, zip(*pairs[start : start + _BATCH], strict=True))
            coded = self.tokenizer(
                notes, texts, padding=True, truncation="only_first", max_length=self.longest,
                return_tensors="pt",
            )  # fmt: skip
            logits = self.model(**coded.to(self.model.device)).logits
            rows.append(logits.float().softmax(-1).cpu())
        return torch.cat(rows)


def _cut_note(note: str, tokens: list[Span], room: int) -> list[Span]:
    """Parts of a note of at most `room` tokens, made of whole sentences where these are shorter;
    the last sentence of a part also begins the next one."""
    ends, pieces = [end for _, end in tokens], []
    for start, end in find_sentences(note):
        stop = min(bisect_right(ends, end - 1) + 1, len(tokens))
        pieces += [(i, min(i + room, stop)) for i in range(bisect_right(ends, start), stop, room)]
    parts, first, last = [], 0, -1
    while last + 1 < len(pieces):
        last = max(j for j, (_, stop) in enumerate(pieces) if stop - pieces[first][0] <= room)
        parts.append((tokens[pieces[first][0]][0], ends[pieces[last][1] - 1]))
        first = max(first + 1, last)
    return parts


def read_label_order(id2label: dict[int, str]) -> dict[str, int]:
    """Which output means what: {"support": i} and, where there is one, {"contradiction": j}.

    The order differs between checkpoints, so it is read, never assumed. Raises HallulibError for
    labels like LABEL_0, which say nothing.
    """
    meanings = {name: meaning for meaning, names in _LABELS.items() for name in names.split()}
    labels = {int(i): re.sub("[^a-z]", "", label.lower()) for i, label in id2label.items()}
    said = [meanings.get(label, "") for label in labels.values()]
    if "" in said or said.count("support") != 1:
        raise HallulibError(
            f"the labels {list(id2label.values())} do not say which one means 'supported'",
            'write what the model\'s card says into "id2label" of its config.json, with the names '
            "entailment, neutral and contradiction (or entailment and not_entailment)",
        )
    return {meaning: i for i, meaning in zip(labels, said, strict=True) if meaning != "other"}


def _load(name_or_path: str, device: str) -> tuple:
    """(model, tokenizer, a name without the path of somebody's machine)."""
    name, _, revision = name_or_path.partition("@")
    folder, shown = resolve_path(name_or_path), name_or_path
    if name and folder.is_dir():
        name, shown = str(folder), folder.name
    where = {"revision": revision or "main"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model = AutoModelForSequenceClassification.from_pretrained(name, **where)
    except (OSError, ValueError, ImportError) as error:
        raise HallulibError(
            f"the entailment model '{shown}' cannot be loaded: {str(error).splitlines()[0]}",
            "set evaluation.nli_model to a folder, or to a hub id[@revision] (check the network)",
        ) from error
    return model.to(device).eval(), tokenizer, shown
