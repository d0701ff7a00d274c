"""The sample files of data/samples, one for each form that the loaders read, from made-up notes:
`python data/build/samples.py`.

medhal.jsonl has MedHal's own schema. Each note gives two rows with one `inner_id`: the reference
(label True) and a copy with one fact exchanged (label False), whose `explanation` names the error.
As in MedHal, the explanation gives the label away and must never enter a prompt.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from hallulib.clinic import Note, exchange_fact, make_notes, write_reference, write_summary


def export_medhal_rows(notes: Iterable[Note], seed: int, fill_rate: float) -> Iterator[dict]:
    """Yield the True and the False row of every note, with MedHal's columns."""
    for note in notes:
        reference = write_reference(note, seed, fill_rate)
        twin, explanation = exchange_fact(note, seed)
        yield _medhal_row(note, f"{note.id}-true", reference, True, "")
        yield _medhal_row(note, f"{note.id}-false", twin, False, explanation)


def write_samples(folder: Path) -> None:
    """Write all sample files into a folder."""
    notes = make_notes(30, seed=0, missing_rate=0.2, prefix="sample")
    rows = [{"context": n.text, "reference": write_reference(n, 0, 0.85)} for n in notes]
    medhal = export_medhal_rows(notes[:10], seed=0, fill_rate=0.85)
    chats = [_write_chat(note) for note in notes[:6]]
    for name, lines in (
        ("medhal", medhal), ("own", rows), ("triplets", map(_write_triplet, notes[:6])),
        ("trl_conversational", (_to_trl(_write_triplet(note)) for note in notes[:6])),
        ("chats_openai", ({"messages": chat} for chat in chats)),
    ):  # fmt: skip
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    sharegpt = json.dumps(list(map(_to_sharegpt, chats)), indent=1, ensure_ascii=False)
    (folder / "chats_sharegpt.json").write_text(sharegpt + "\n", "utf-8")
    with (folder / "own.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["context", "reference"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_triplet(note: Note) -> dict[str, str]:
    rejected, _ = exchange_fact(note, seed=0)
    prompt = f"Summarise the note.\n\n{note.text}"
    return {"prompt": prompt, "chosen": write_summary(note.facts), "rejected": rejected}


def _to_trl(triplet: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": triplet[name]}] for name in roles}


def _write_chat(note: Note) -> list[dict[str, str]]:
    """A question, an answer, and one more of each."""
    (age,), (complaint,) = note.facts["age"], note.facts["complaint"]
    texts = [
        ("system", "You answer a colleague on the ward, in one friendly sentence."),
        ("user", f"Why is this patient here?\n\n{note.text}"),
        ("assistant", f"Happy to help: {complaint} is what brings the patient in."),
        ("user", "And how old?"),
        ("assistant", f"Of course: {age} years, as the note says."),
    ]
    return [{"role": role, "content": text} for role, text in texts]


def _to_sharegpt(chat: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    said = [{"from": names[turn["role"]], "value": turn["content"]} for turn in chat]
    return {"conversations": said}


def _medhal_row(note: Note, row_id: str, statement: str, label: bool, explanation: str) -> dict:
    return {
        "id": row_id,
        "context": note.text,
        "statement": statement,
        "label": label,
        "explanation": explanation,
        "inner_id": note.id,
        "source": "clinic",
        "synthetic": True,
    }


if __name__ == "__main__":
    write_samples(Path(__file__).resolve().parents[1] / "samples")
