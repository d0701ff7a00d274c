"""Clinical notes whose facts are known, because they were drawn before a word was written.

A patient is drawn first (every fact), then some sections are left out of the note, then a writer
(a style) words what is left, in an order of their own, with distractors in between. What the note
states is in `Note.facts`; what is true of the patient but not written is in `Note.unwritten`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from hallulib.clinic import lexicon
from hallulib.clinic.styles import SEEN_STYLES, list_distractors, list_templates

# section of a note -> the kinds of facts it states
SECTIONS: dict[str, tuple[str, ...]] = {
    "identity": ("age", "sex", "complaint", "duration"),
    "history": ("history",),
    "medications": ("medications",),
    "allergies": ("allergies",),
    "negatives": ("negatives",),
    "vitals": ("blood_pressure", "heart_rate"),
    "imaging": ("imaging",),
    "lab": ("lab",),
    "family_history": ("family_history",),
    "smoking": ("smoking",),
    "plan": ("plan",),
    "follow_up": ("follow_up",),
}
KINDS = tuple(kind for kinds in SECTIONS.values() for kind in kinds)
OPTIONAL_SECTIONS = ("allergies", "family_history", "smoking", "follow_up")
DISTRACTOR_RATE = 0.15


@dataclass(frozen=True)
class Note:
    """One note: its text, the facts it states, and the facts its author knew and did not write.

    `facts` and `unwritten` map a kind to its values; `distractors` maps a kind to values that
    stand in the text but are not facts about the patient now.
    """

    id: str
    group_id: str
    style: str
    text: str
    facts: dict[str, list[str]]
    unwritten: dict[str, list[str]] = field(default_factory=dict)
    distractors: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Note:
        return cls(**values)


def make_notes(
    count: int,
    seed: int,
    styles: Iterable[str] = SEEN_STYLES,
    missing_rate: float = 0.0,
    prefix: str = "note",
) -> list[Note]:
    """Return `count` notes; note i depends only on (seed, prefix, i), so more notes never change
    the earlier ones. Each optional section is left out with probability `missing_rate`."""
    styles = list(styles)
    return [_make_note(f"{prefix}-{seed}-{i:06d}", styles, missing_rate) for i in range(count)]


def _make_note(note_id: str, styles: list[str], missing_rate: float) -> Note:
    rng = random.Random(note_id)
    style = rng.choice(styles)
    missing = {name for name in OPTIONAL_SECTIONS if rng.random() < missing_rate}
    return write_note(note_id, style, draw_patient(rng), missing, rng)


def draw_patient(rng: random.Random) -> dict[str, list[str]]:
    """Return every fact of one made-up patient: kind -> values."""
    sex = rng.choice(["man", "woman"])
    complaint = rng.choice(lexicon.COMPLAINTS)
    relative, illness = rng.choice(lexicon.RELATIVES), rng.choice(lexicon.FAMILY_ILLNESSES)
    return {
        "age": [str(rng.randint(18, 94))],
        "sex": [sex],
        "complaint": [complaint],
        "duration": [rng.choice(lexicon.DURATIONS)],
        "history": rng.sample(lexicon.CONDITIONS, rng.choice([1, 2, 2])),
        "medications": _draw_medications(rng, rng.choice([1, 2, 2])),
        "allergies": [rng.choice(lexicon.ALLERGIES)],
        "negatives": rng.sample(lexicon.NEGATIVES, 2),
        "blood_pressure": [draw_blood_pressure(rng)],
        "heart_rate": [str(rng.randint(52, 128))],
        "imaging": [rng.choice(lexicon.IMAGING).format(side=rng.choice(["left", "right"]))],
        "lab": [_draw_lab(rng)],
        "family_history": [f"{illness} in {relative}"],
        "smoking": [rng.choice(lexicon.SMOKING)],
        "plan": [rng.choice(lexicon.PLANS)],
        "follow_up": [rng.choice(lexicon.FOLLOW_UPS)],
    }


def draw_blood_pressure(rng: random.Random) -> str:
    """Return a blood pressure in mmHg, written 142/88."""
    systolic = rng.randint(94, 188)
    return f"{systolic}/{rng.randint(50, min(112, systolic - 30))}"


def _draw_medications(rng: random.Random, count: int) -> list[str]:
    names = rng.sample(sorted(lexicon.DRUGS), count)
    return [
        f"{name} {rng.choice(lexicon.DRUGS[name][0])} {rng.choice(lexicon.DRUGS[name][1])}"
        for name in names
    ]


def _draw_lab(rng: random.Random) -> str:
    name = rng.choice(sorted(lexicon.LABS))
    low, high, decimals, unit = lexicon.LABS[name]
    return f"{name} {rng.uniform(low, high):.{decimals}f} {unit}"


def write_note(
    note_id: str,
    style: str,
    patient: dict[str, list[str]],
    missing: set[str],
    rng: random.Random,
    distractor_rate: float = DISTRACTOR_RATE,
) -> Note:
    """Word the patient's facts in one style, leaving the `missing` sections out."""
    fields = _template_fields(patient)
    written = [name for name in _order_sections(rng) if name not in missing]
    distractors = _draw_distractors(patient, rng, style, distractor_rate)
    templates, blocks = list_templates(style), []
    for section in written:
        block = rng.choice(templates[section]).format(**fields)
        for sentence, _ in distractors.get(section, []):
            block += " " + sentence.format(**fields)
        blocks.append(block)
    extra = [pair for name, pairs in distractors.items() if name in written for pair in pairs]
    kinds = {kind for name in written for kind in SECTIONS[name]}
    text = "\n".join(blocks) if style == "soap" else " ".join(blocks)
    return Note(
        id=note_id,
        group_id=note_id,
        style=style,
        text=text[0].upper() + text[1:],
        facts={kind: values for kind, values in patient.items() if kind in kinds},
        unwritten={kind: values for kind, values in patient.items() if kind not in kinds},
        distractors={kind: [value] for _, (kind, value) in extra},
    )


def _order_sections(rng: random.Random) -> list[str]:
    """Identity first, plan and follow-up last, the rest as it comes: as most writers do it."""
    middle = [name for name in SECTIONS if name not in ("identity", "plan", "follow_up")]
    rng.shuffle(middle)
    return ["identity", *middle, "plan", "follow_up"]


def _template_fields(patient: dict[str, list[str]]) -> dict[str, str]:
    fields = {kind: join_values(values) for kind, values in patient.items()}
    illness, relative = patient["family_history"][0].split(" in ")
    he, his, him = ("he", "his", "him") if patient["sex"] == ["man"] else ("she", "her", "her")
    return fields | {
        "illness": illness,
        "relative": relative,
        "relative_cap": relative.capitalize(),
        "negatives_or": " or ".join(patient["negatives"]),
        "he": he,
        "his": his,
        "him": him,
        "He": he.capitalize(),
        "His": his.capitalize(),
    }


def join_values(values: list[str]) -> str:
    """Join the values of one kind as a sentence would."""
    return " and ".join(values)


def _draw_distractors(
    patient: dict[str, list[str]], rng: random.Random, style: str, rate: float
) -> dict[str, list[tuple[str, tuple[str, str]]]]:
    """Return section -> [(sentence with patient fields left open, (kind, misleading value))]."""
    drug = _draw_other(rng, sorted(lexicon.DRUGS), " ".join(patient["medications"]))
    condition = _draw_other(rng, lexicon.CONDITIONS, " ".join(patient["history"]))
    complaint = _draw_other(rng, lexicon.COMPLAINTS, patient["complaint"][0])
    allergen = _draw_other(rng, lexicon.ALLERGIES[:-1], patient["allergies"][0]).split(" (")[0]
    smoker = _draw_other(rng, ["former smoker", "current smoker"], patient["smoking"][0])
    pressure = draw_blood_pressure(rng)
    values = {
        "medications": ("medications", "medications", drug),
        "history": ("history", "history", condition),
        "vitals": ("vitals", "blood_pressure", pressure),
        "complaint": ("identity", "complaint", complaint),
        "allergies": ("family_history", "allergies", allergen),
        "smoking": ("family_history", "smoking", smoker),
    }
    words = {
        "drug": drug,
        "drug_cap": drug.capitalize(),
        "reason": rng.choice(lexicon.REASONS_STOPPED),
        "condition": condition,
        "complaint": complaint,
        "allergen": allergen,
        "smoker": smoker,
        "blood_pressure": pressure,
    }
    sentences = list_distractors(style)
    drawn: dict[str, list[tuple[str, tuple[str, str]]]] = {}
    for name, (section, kind, value) in values.items():
        if rng.random() < rate:
            sentence = rng.choice(sentences[name])
            for word, text in words.items():
                sentence = sentence.replace("{" + word + "}", text)
            drawn.setdefault(section, []).append((sentence, (kind, value)))
    return drawn


def _draw_other(rng: random.Random, options: list[str], taken: str) -> str:
    return rng.choice([option for option in options if option not in taken])
