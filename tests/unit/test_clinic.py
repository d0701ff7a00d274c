"""The clinic world: what is drawn is what is written, and what is checked is exact."""

import pytest
from base_model import CORPUS_WRITERS, build_tokenizer, encode_note
from pretrain import separate_embeddings
from samples import write_samples

from hallulib.clinic import (
    HELD_OUT_STYLE,
    Note,
    check,
    exchange_fact,
    find_omissions,
    make_notes,
    write_reference,
    write_summary,
)

from hallulib.clinic.notes import OPTIONAL_SECTIONS, SECTIONS
from hallulib.clinic.words import WORDS, WRITERS
from hallulib.files import project_root

pytestmark = pytest.mark.unit

NOTES = make_notes(200, seed=3, styles=list(WRITERS), missing_rate=0.3)


def _verdicts(facts: dict, summary: str) -> set[tuple[str, str, str | None]]:
    return {(s["kind"], s["verdict"], s["error_type"]) for s in check(facts, summary)}


def _errors(facts: dict, summary: str) -> set[tuple[str, str, str | None]]:
    return {v for v in _verdicts(facts, summary) if v[1] != "supported"}


def test_every_fact_of_a_note_stands_in_its_text_word_for_word():
    for note in NOTES:
        text = note.text.lower()
        for kind, values in note.facts.items():
            words = values[0].split(" in ") if kind == "family_history" else values
            assert all(word.lower() in text for word in words), (note.id, kind)


def test_every_writer_has_sentences_for_every_section():
    assert all(set(writer.sentences) == set(SECTIONS) for writer in WRITERS.values())


def test_a_faithful_summary_has_no_error_and_omits_nothing():
    for note in NOTES:
        summary = write_summary(note.facts)
        assert not _errors(note.facts, summary), summary
        assert find_omissions(note.facts, summary) == []


def test_statements_point_at_their_own_text():
    for note in NOTES:
        summary = write_reference(note, 0, 1.0)
        for statement in find_statements(summary):
            assert summary[statement.start : statement.end] == statement.text


def test_a_fact_that_the_note_lacks_is_not_in_the_note():
    note = next(n for n in NOTES if "allergies" in n.unwritten)
    summary = write_summary(note.facts | {"allergies": note.unwritten["allergies"]})
    assert _errors(note.facts, summary) == {("allergies", "not_in_note", "fabrication")}


def test_another_dose_of_the_same_drug_is_a_detail_and_another_drug_is_made_up():
    facts = {"medications": ["metformin 500 mg twice daily"]}
    assert _errors(facts, "Takes metformin 850 mg twice daily.") == {
        ("medications", "contradicted", "detail")
    }
    assert _errors(facts, "Takes gabapentin 300 mg at night.") == {
        ("medications", "contradicted", "fabrication")
    }


def test_a_relatives_or_former_value_taken_over_is_contextual():
    facts = {"history": ["gout"], "distractors": {"history": ["asthma"]}}
    assert _errors(facts, "History of asthma.") == {("history", "contradicted", "contextual")}


def test_a_denied_complaint_is_a_negation():
    facts = {"complaint": ["chest pain"], "negatives": ["fever"]}
    assert _errors(facts, "Denies fever and chest pain.") == {
        ("negatives", "contradicted", "negation")
    }


def test_a_sentence_outside_the_language_of_summaries_is_an_error_not_a_gap():
    verdict = check({"age": ["40"]}, "The patient is an astronaut.")[0]
    assert verdict["kind"] == "unparsed"
    assert verdict["verdict"] == "not_in_note"


def test_a_decimal_point_does_not_end_a_statement():
    assert [s.text for s in find_statements("Lab: potassium 3.8 mmol/L.")] == [
        "potassium 3.8 mmol/L"
    ]


def test_an_empty_summary_states_nothing_and_omits_everything():
    note = NOTES[0]
    assert check(note.facts, "") == []
    assert set(find_omissions(note.facts, "")) == set(note.facts)


def test_no_value_could_be_split_in_two_by_the_checker():
    values = [value for values in WORDS.values() for value in values]
    assert not [value for value in values if " and " in value or ", " in value]


def test_a_reference_states_missing_sections_at_the_fill_rate():
    notes = make_notes(600, seed=1, missing_rate=0.5)
    missing = sum(len(note.unwritten) for note in notes)
    filled = sum(len(_fabrications(note, write_reference(note, 0, 0.85))) for note in notes)
    assert 0.80 < filled / missing < 0.90
    assert all(not _fabrications(note, write_reference(note, 0, 0.0)) for note in notes)


def _fabrications(note: Note, summary: str) -> list[dict]:
    return [s for s in check(note.facts, summary) if s["verdict"] != "supported"]


def test_only_optional_sections_go_missing():
    assert {kind for note in NOTES for kind in note.unwritten} <= set(OPTIONAL_SECTIONS)


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
        kinds = {kind for kind, _, _ in _errors(note.facts, summary)}
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
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
