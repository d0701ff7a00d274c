"""Clinical notes whose facts are known, because they were drawn before a word was written.

A patient is drawn first (every fact), then some sections are left out of the note, then a writer
(a style) words what is left, in an order of their own, with distractors in between. What the note
states is in `Note.facts`; what is true of the patient but not written is in `Note.unwritten`.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import yaml

Facts = dict[str, list[str]]  # kind of fact -> its values
# section of a note -> the kinds of facts it states
SECTIONS: dict[str, tuple[str, ...]] = {
    "identity": ("age", "sex", "complaint", "duration"),
    "history": ("history",), "medications": ("medications",), "allergies": ("allergies",),
    "negatives": ("negatives",), "vitals": ("blood_pressure", "heart_rate"),
    "imaging": ("imaging",), "lab": ("lab",), "family_history": ("family_history",),
    "smoking": ("smoking",), "plan": ("plan",), "follow_up": ("follow_up",),
}  # fmt: skip
KINDS = tuple(kind for kinds in SECTIONS.values() for kind in kinds)
OPTIONAL_SECTIONS = ("allergies", "family_history", "smoking", "follow_up")
# topic of a misleading sentence -> the section it slips into, the kind it misleads about, its word
DISTRACTORS = {
    "medications": ("medications", "medications", "drug"),
    "history": ("history", "history", "condition"),
    "vitals": ("vitals", "blood_pressure", "blood_pressure"),
    "complaint": ("identity", "complaint", "complaint"),
    "allergies": ("family_history", "allergies", "allergen"),
    "smoking": ("family_history", "smoking", "smoker"),
}


@dataclass(frozen=True)
class Writer:
    """Who words a note: sentence templates per section, misleading sentences per topic, and how
    often one of each topic slips in."""

    style: str
    sentences: dict[str, list[str]]
    misleading: dict[str, list[str]]
    distractor_rate: float = 0.15


WORDS, _STYLES = (
    yaml.safe_load(files("hallulib.clinic").joinpath(name).read_text("utf-8"))
    for name in ("words.yaml", "styles.yaml")
)
HELD_OUT_STYLE: str = _STYLES["held_out"]
WRITERS = {
    style: Writer(style, sentences, _STYLES["misleading"])
    for style, sentences in _STYLES["styles"].items()
}
SEEN_STYLES = [style for style in WRITERS if style != HELD_OUT_STYLE]


@dataclass(frozen=True)
class Note:
    """One note: its text, the facts it states, and the facts its author knew and did not write.

    `distractors`: kind -> values that stand in the text but are not true of the patient now.
    """

    id: str
    group_id: str
    style: str
    text: str
    facts: Facts
    unwritten: Facts = field(default_factory=dict)
    distractors: Facts = field(default_factory=dict)


def make_notes(
    count: int,
    seed: int,
    styles: Iterable[str] = SEEN_STYLES,
    missing_rate: float = 0.0,
    prefix: str = "note",
) -> list[Note]:
    """Return `count` notes; note i depends only on (seed, prefix, i), so more notes never change
    the earlier ones. Each optional section is left out with probability `missing_rate`."""
    notes, styles = [], list(styles)
    for i in range(count):
        note_id = f"{prefix}-{seed}-{i:06d}"
        rng = random.Random(note_id)
        writer = WRITERS[rng.choice(styles)]
        missing = {name for name in OPTIONAL_SECTIONS if rng.random() < missing_rate}
        notes.append(write_note(note_id, writer, draw_patient(rng), missing, rng))
    return notes


def draw_patient(rng: random.Random) -> Facts:
    """Return every fact of one made-up patient: kind -> values."""
    sex = rng.choice(["man", "woman"])
    complaint = rng.choice(WORDS["complaints"])
    relative, illness = rng.choice(WORDS["relatives"]), rng.choice(WORDS["family_illnesses"])
    return {
        "age": [str(rng.randint(18, 94))],
        "sex": [sex],
        "complaint": [complaint],
        "duration": [rng.choice(WORDS["durations"])],
        "history": rng.sample(WORDS["conditions"], rng.choice([1, 2, 2])),
        "medications": _draw_medications(rng, rng.choice([1, 2, 2])),
        "allergies": [rng.choice(WORDS["allergies"])],
        "negatives": rng.sample(WORDS["negatives"], 2),
        "blood_pressure": [_draw_blood_pressure(rng)],
        "heart_rate": [str(rng.randint(52, 128))],
        "imaging": [rng.choice(WORDS["imaging"]).format(side=rng.choice(["left", "right"]))],
        "lab": [_draw_lab(rng)],
        "family_history": [f"{illness} in {relative}"],
        "smoking": [rng.choice(WORDS["smoking"])],
        "plan": [rng.choice(WORDS["plans"])],
        "follow_up": [rng.choice(WORDS["follow_ups"])],
    }


def _draw_blood_pressure(rng: random.Random) -> str:
    """A blood pressure in mmHg, written 142/88."""
    systolic = rng.randint(94, 188)
    return f"{systolic}/{rng.randint(50, min(112, systolic - 30))}"


def _draw_medications(rng: random.Random, count: int) -> list[str]:
    drugs = WORDS["drugs"]
    return [
        f"{name} {rng.choice(drugs[name]['doses'])} {rng.choice(drugs[name]['times'])}"
        for name in rng.sample(sorted(drugs), count)
    ]


def _draw_lab(rng: random.Random) -> str:
    name = rng.choice(sorted(WORDS["labs"]))
    lab = WORDS["labs"][name]
    return f"{name} {rng.uniform(lab['low'], lab['high']):.{lab['decimals']}f} {lab['unit']}"


def write_note(
    note_id: str, writer: Writer, patient: Facts, missing: set[str], rng: random.Random
) -> Note:
    """Let a writer word the patient's facts, leaving the `missing` sections out."""
    # identity first, plan and follow-up last, the rest as it comes: as most writers do it
    middle = [name for name in SECTIONS if name not in ("identity", "plan", "follow_up")]
    rng.shuffle(middle)
    written = [s for s in ("identity", *middle, "plan", "follow_up") if s not in missing]
    drawn = _draw_distractors(patient, writer, rng)
    fields, blocks = _name_fields(patient), []
    for section in written:
        sentences = [rng.choice(writer.sentences[section])]
        sentences += [sentence for sentence, _, _ in drawn.get(section, [])]
        blocks.append(" ".join(sentence.format(**fields) for sentence in sentences))
    text = ("\n" if writer.style == "soap" else " ").join(blocks)
    kinds = {kind for name in written for kind in SECTIONS[name]}
    return Note(
        id=note_id, group_id=note_id, style=writer.style, text=text[0].upper() + text[1:],
        facts={kind: values for kind, values in patient.items() if kind in kinds},
        unwritten={kind: values for kind, values in patient.items() if kind not in kinds},
        distractors={kind: [value] for name in drawn if name in written
                     for _, kind, value in drawn[name]},
    )  # fmt: skip


def _name_fields(patient: Facts) -> dict[str, str]:
    """What a sentence template may ask for: values by kind, and pronouns."""
    illness, relative = patient["family_history"][0].split(" in ")
    he, his, him = ("he", "his", "him") if patient["sex"] == ["man"] else ("she", "her", "her")
    return {kind: " and ".join(values) for kind, values in patient.items()} | {
        "illness": illness, "relative": relative, "relative_cap": relative.capitalize(),
        "negatives_or": " or ".join(patient["negatives"]),
        "he": he, "his": his, "him": him, "He": he.capitalize(), "His": his.capitalize(),
    }  # fmt: skip


def _draw_distractors(
    patient: Facts, writer: Writer, rng: random.Random
) -> dict[str, list[tuple[str, str, str]]]:
    """Section -> [(sentence with the patient's fields left open, kind, misleading value)]."""

    def draw_other(options: Sequence[str], kind: str) -> str:
        taken = " ".join(patient[kind])
        return rng.choice([option for option in options if option not in taken])

    drug = draw_other(sorted(WORDS["drugs"]), "medications")
    words = {
        "drug": drug,
        "drug_cap": drug.capitalize(),
        "condition": draw_other(WORDS["conditions"], "history"),
        "complaint": draw_other(WORDS["complaints"], "complaint"),
        "allergen": draw_other(WORDS["allergies"][:-1], "allergies").split(" (")[0],
        "smoker": draw_other(["former smoker", "current smoker"], "smoking"),
        "blood_pressure": _draw_blood_pressure(rng),
        "reason": rng.choice(WORDS["reasons_stopped"]),
    }
    drawn: dict[str, list[tuple[str, str, str]]] = {}
    for topic, (section, kind, value) in DISTRACTORS.items():
        if rng.random() < writer.distractor_rate:
            sentence = rng.choice(writer.misleading[topic])
            for word, text in words.items():
                sentence = sentence.replace("{" + word + "}", text)
            drawn.setdefault(section, []).append((sentence, kind, words[value]))
    return drawn
