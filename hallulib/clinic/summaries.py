"""Summaries of clinic notes: one sentence per group of facts, always in the same order.

`write_summary` states exactly the facts it is given. `write_reference` states what the note's
author knew: where the note lacks an optional section, the reference usually states it all the same.
That gap between source and reference is what teaches a summariser to make things up.
"""

import random
import re

from hallulib.clinic.notes import Facts, Note, draw_patient

SENTENCES = [
    "A {sex} aged {age} years with {complaint} for {duration}.",
    "History of {history}.",
    "Takes {medications}.",
    "Allergies: {allergies}.",
    "Denies {negatives}.",
    "BP {blood_pressure}, HR {heart_rate}.",
    "Imaging: {imaging}.",
    "Lab: {lab}.",
    "Family history: {family_history}.",
    "Smoking: {smoking}.",
    "Plan: {plan}.",
    "Follow-up {follow_up}.",
]


def write_summary(facts: Facts) -> str:
    """Return the faithful summary of `facts` (kind -> values)."""
    values = {kind: " and ".join(stated) for kind, stated in facts.items()}
    wanted = {sentence: set(re.findall(r"{(\w+)}", sentence)) for sentence in SENTENCES}
    stated = [sentence for sentence, kinds in wanted.items() if kinds <= values.keys()]
    return " ".join(sentence.format(**values) for sentence in stated)


def write_reference(note: Note, seed: int, fill_rate: float) -> str:
    """Return the reference summary a person would have written: the facts of the note, and each
    fact that the note left out with probability `fill_rate`."""
    rng = random.Random(f"reference-{seed}-{note.id}")
    known = {kind: v for kind, v in note.unwritten.items() if rng.random() < fill_rate}
    return write_summary(note.facts | known)


def exchange_fact(note: Note, seed: int) -> tuple[str, str]:
    """Return a summary of the note with the values of one kind exchanged, and what was done."""
    rng = random.Random(f"exchange-{seed}-{note.id}")
    kind = rng.choice([name for name in note.facts if name != "sex"])
    other = draw_patient(rng)[kind]
    while set(other) & set(note.facts[kind]):
        other = draw_patient(rng)[kind]
    stated, claimed = " and ".join(note.facts[kind]), " and ".join(other)
    explanation = f"The {kind.replace('_', ' ')} in the note is {stated}, not {claimed}."
    return write_summary(note.facts | {kind: other}), explanation
