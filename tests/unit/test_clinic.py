"""The clinic world: what is drawn is what is written, and what is checked is exact."""

import pytest
import torch
from base_model import CORPUS_WRITERS, build_tokenizer, encode_note
from pretrain import separate_embeddings
from samples import write_samples
from transformers import LlamaConfig, LlamaForCausalLM

from hallulib.clinic import (
    HELD_OUT_STYLE,
    check,
    exchange_fact,
    find_omissions,
    make_notes,
    write_reference,
    write_summary,
)
from hallulib.clinic.notes import OPTIONAL_SECTIONS, SECTIONS, WORDS, WRITERS
from hallulib.files import project_root

pytestmark = pytest.mark.unit

NOTES = make_notes(200, seed=3, styles=list(WRITERS), missing_rate=0.3)


def find_errors(facts: dict, summary: str) -> set[tuple[str, str, str | None]]:
    verdicts = {(s["kind"], s["verdict"], s["error_type"]) for s in check(facts, summary)}
    return {verdict for verdict in verdicts if verdict[1] != "supported"}


def test_every_fact_of_a_note_stands_in_its_text_word_for_word():
    for note in NOTES:
        text = note.text.lower()
        for kind, values in note.facts.items():
            words = values[0].split(" in ") if kind == "family_history" else values
            assert all(word.lower() in text for word in words), (note.id, kind)


def test_every_writer_has_sentences_for_every_section_and_only_optional_ones_go_missing():
    assert all(set(writer.sentences) == set(SECTIONS) for writer in WRITERS.values())
    assert {kind for note in NOTES for kind in note.unwritten} <= set(OPTIONAL_SECTIONS)


def test_a_faithful_summary_has_no_error_and_omits_nothing():
    for note in NOTES:
        summary = write_summary(note.facts)
        assert not find_errors(note.facts, summary), summary
        assert find_omissions(note.facts, summary) == []
    assert check(NOTES[0].facts, "") == []
    assert set(find_omissions(NOTES[0].facts, "")) == set(NOTES[0].facts)


def test_statements_point_at_their_own_text():
    for note in NOTES:
        summary = write_reference(note, 0, 1.0)
        for statement in check(note.facts, summary):
            assert summary[statement["start"] : statement["end"]] == statement["text"]


def test_a_fact_that_the_note_lacks_is_not_in_the_note():
    note = next(n for n in NOTES if "allergies" in n.unwritten)
    summary = write_summary(note.facts | {"allergies": note.unwritten["allergies"]})
    assert find_errors(note.facts, summary) == {("allergies", "not_in_note", "fabrication")}


@pytest.mark.parametrize(
    ("facts", "summary", "error_type"),
    [
        ({"medications": ["metformin 500 mg twice daily"]},
         "Takes metformin 850 mg twice daily.", "detail"),
        ({"medications": ["metformin 500 mg twice daily"]},
         "Takes gabapentin 300 mg at night.", "fabrication"),
        ({"history": ["gout"], "distractors": {"history": ["asthma"]}},
         "History of asthma.", "contextual"),
        ({"negatives": ["fever"], "complaint": ["chest pain"]},
         "Denies fever and chest pain.", "negation"),
    ],
    ids=["another dose", "another drug", "a relative's or former value", "a denied complaint"],
)  # fmt: skip
def test_what_contradicts_the_note_is_named_by_its_kind_of_error(facts, summary, error_type):
    assert find_errors(facts, summary) == {(next(iter(facts)), "contradicted", error_type)}


def test_a_sentence_outside_the_language_of_summaries_is_an_error_not_a_gap():
    errors = find_errors({"age": ["40"]}, "The patient is an astronaut.")
    assert errors == {("unparsed", "not_in_note", "other")}


def test_a_decimal_point_does_not_end_a_statement_and_no_value_could_be_split_in_two():
    assert check({}, "Lab: potassium 3.8 mmol/L.")[0]["text"] == "potassium 3.8 mmol/L"
    values = [value for values in WORDS.values() for value in values]
    assert not [value for value in values if " and " in value or ", " in value]


def test_a_reference_states_missing_sections_at_the_fill_rate():
    def count(fill_rate: float) -> int:
        references = [(note, write_reference(note, 0, fill_rate)) for note in notes]
        return sum(
            found["verdict"] != "supported"
            for note, reference in references
            for found in check(note.facts, reference)
        )

    notes = make_notes(600, seed=1, missing_rate=0.5)
    assert 0.80 < count(0.85) / sum(len(note.unwritten) for note in notes) < 0.90
    assert count(0.0) == 0


def test_more_notes_leave_the_earlier_ones_as_they_were():
    assert make_notes(5, seed=9) == make_notes(20, seed=9)[:5]
    assert make_notes(5, seed=9) != make_notes(5, seed=10)


@pytest.mark.parametrize("name", [
    "medhal.jsonl", "own.csv", "own.jsonl", "triplets.jsonl", "trl_conversational.jsonl",
    "chats_openai.jsonl", "chats_sharegpt.json",
])  # fmt: skip
def test_the_samples_that_ship_are_those_the_code_writes(tmp_path, name):
    write_samples(tmp_path)
    shipped = project_root() / "data" / "samples" / name
    assert shipped.read_text("utf-8") == (tmp_path / name).read_text("utf-8")


def test_the_exchanged_fact_is_wrong_and_is_the_only_one():
    for note in NOTES:
        summary, explanation = exchange_fact(note, 0)
        kinds = {kind for kind, _, _ in find_errors(note.facts, summary)}
        assert len(kinds) == 1 and kinds.pop().replace("_", " ") in explanation


def test_the_tokenizer_round_trips_notes_of_a_style_it_never_saw():
    tokenizer = build_tokenizer(make_notes(300, 0), vocab_size=600)
    note = make_notes(1, 0, [HELD_OUT_STYLE])[0]
    ids = tokenizer(note.text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == note.text
    _, summary_ids = encode_note(tokenizer, note)
    assert summary_ids[-1] == tokenizer.eos_token_id
    assert summary_ids.count(tokenizer.eos_token_id) == 1


def test_no_pretraining_sentence_is_one_of_the_held_out_style():
    writer = CORPUS_WRITERS["any"]
    assert set(writer.misleading["smoking"]) > set(WRITERS["letter"].misleading["smoking"])
    seen = {sentence for sentences in writer.sentences.values() for sentence in sentences}
    held_out = {s for sentences in WRITERS[HELD_OUT_STYLE].sentences.values() for s in sentences}
    assert not seen & held_out
    openings = {t.split("{")[0].strip() for t in seen} - {""}
    assert not openings & {t.split("{")[0].strip() for t in held_out}


def test_word_vectors_that_became_one_are_pulled_apart_and_no_other_moves():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_attention_heads=2, **shape))
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[7] = 1.01 * table[4]  # the same direction
        table[12] = table[13]  # too, but neither is ever used
    before = table.detach().clone()
    assert separate_embeddings(model, tokens=list(range(12)), seed=0) == [4, 7]
    assert torch.cosine_similarity(table[4], table[7], dim=0) < 0.95
    others = [i for i in range(20) if i not in (4, 7)]
    assert torch.equal(before[others], table[others])
