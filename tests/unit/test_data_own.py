"""Anybody's files: encodings, quotes, column names, triplets, chats; and what can be wrong."""

import json
from collections import Counter

import pandas as pd
import pytest
from data_factory import REAL, TEMPLATE, open_run, write_file, write_jsonl

from hallulib.data import prepare_data, stream_own_rows
from hallulib.data.schema import SPLITS, build_prompt, hash_context
from hallulib.data.splits import find_leaks
from hallulib.errors import DataError, RecipeError
from hallulib.files import project_root
from hallulib.recipe import load_recipe

pytestmark = pytest.mark.unit
needs_mts = pytest.mark.skipif(
    not (REAL / "mts-dialog").exists(), reason="python -m hallulib fetch mts-dialog first"
)
needs_medec = pytest.mark.skipif(
    not (REAL / "medec").exists(), reason="MEDEC is not in data/external/medec"
)
NOTE = {"context": "dialogue", "reference": "summary"}  # columns: our name -> the file's


def load(path, columns=None, encoding="auto") -> tuple[list[dict], Counter]:
    dropped = Counter()
    return list(stream_own_rows(path, TEMPLATE, dropped, columns, encoding)), dropped


def load_one(tmp_path, record, columns=None) -> dict:
    ((row,), _) = load(write_jsonl(tmp_path / "one.jsonl", [record]), columns)
    return row


# --- notes and prompts -----------------------------------------------------------------------


def test_own_rows_come_from_context_or_prompt_columns(tmp_path):
    text = '\ufeffcontext,reference\n"A note, with\nlines", Short. \nOther,Text\n'
    rows, _ = load(write_file(tmp_path / "a.csv", text))
    assert rows[0]["prompt"] == "Summarise the note.\n\nA note, with\nlines"
    assert rows[0]["reference"] == "Short."
    row = load_one(tmp_path, {"prompt": "Do it.", "reference": "Done."})
    assert row["prompt"] == "Do it." and row["group_id"] == hash_context("do  IT.")
    patient = load_one(tmp_path, {"group_id": 7, "context": "A", "reference": "b"})
    assert patient["group_id"] == "7"
    assert build_prompt("{context} {x}", "{braces}") == "{braces} {x}"


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "dialogue;summary\nA;b\n"), ("a.tsv", "dialogue\tsummary\nA\tb\n"),
     ("a.json", '[{"dialogue": "A", "summary": "b"}]')],
)  # fmt: skip
def test_the_recipe_maps_columns_and_semicolons_tabs_and_json_lists_are_read(tmp_path, name, text):
    path = write_file(tmp_path / name, text)
    ((row,), _) = load(path, NOTE)
    assert (row["context"], row["reference"]) == ("A", "b")
    with pytest.raises(DataError, match=r"row 1: no column 'note'.*dialogue, summary"):
        load(path, NOTE | {"context": "note"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"columns": {"contxt": "dialogue"}}, "contxt"),
     ({"prompt_template": "Summarise."}, "data.prompt_template.*context")],
)  # fmt: skip
def test_an_unknown_column_and_a_template_without_a_place_are_recipe_errors(settings, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("tiny-cpu", {"data": settings})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_unicode_is_recognised_by_its_mark(tmp_path, encoding, ending):
    text = "context,reference\nNaïve 5 µg,“b”\n"
    if ending == "jsonl":
        text = json.dumps({"context": "Naïve 5 µg", "reference": "“b”"}, ensure_ascii=False)
    (tmp_path / f"a.{ending}").write_bytes(text.encode(encoding))
    for named in ("auto", encoding.removesuffix("-sig")):
        ((row,), _) = load(tmp_path / f"a.{ending}", encoding=named)
        assert (row["context"], row["reference"]) == ("Naïve 5 µg", "“b”")


def test_another_encoding_is_never_guessed_but_proposed_and_read_once_named(tmp_path):
    lines = "".join(f"Le café est chaud {i} µg dès l’été,ça va\n" for i in range(20))
    path = tmp_path / "a.csv"
    path.write_bytes(("context,reference\n" + lines).encode("cp1252"))
    with pytest.raises(DataError, match=r"a\.csv, line 2: the bytes are not utf-8") as caught:
        load(path)
    assert "data.encoding" in caught.value.next_step and "afé" in caught.value.next_step
    assert load(path, encoding="cp1252")[0][3]["context"] == "Le café est chaud 3 µg dès l’été"
    with pytest.raises(DataError, match="data.encoding: unknown encoding: klingon"):
        load(path, encoding="klingon")


def test_blank_cells_are_dropped_and_counted(tmp_path):
    rows, dropped = load(write_file(tmp_path / "a.csv", "context,reference\nA,b\nB,\n ,c\n"))
    assert len(rows) == 1 and dropped == {"blank_context": 1, "blank_reference": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "has no rows"),
        ("a.csv", "context,reference\n", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "{}", "holds no list"),
        ("a.json", '[{"context": "a"},', "line 1: not JSON"),
        ("a.json", "[3]", "row 1: int, not an object"),
        ("a.csv", "text,summary\na,b\n", "row 1: no column 'context' .*text, summary"),
        ("a.csv", "context,context\na,b\n", "two columns are called 'context'"),
        ("a.csv", "context,reference\na,b\na,b,c\n", "row 2: more fields"),
        ("a.csv", "context,reference\na,b\na\n", "row 2: fewer fields"),
        ("a.csv", 'context,reference\na,b\n"a,b\nc,d\n', "row 2: not CSV .unexpected end"),
        ("a.csv", 'context,reference\na,b\n"a"x,b\n', "row 2: not CSV"),
        ("a.jsonl", '{"context": "a", "reference": "b"}\n{"context": \n', "line 2: not JSON"),
        ("a.jsonl", '["a"]\n', "row 1: list, not an object"),
        ("a.jsonl", '{"context": null, "reference": "b"}\n', "row 1, column 'context': None"),
        ("a.jsonl", '{"context": NaN, "reference": "b"}\n', "row 1, column 'context': nan"),
        ("a.jsonl", '{"context": "a", "reference": 7}\n', "row 1, column 'reference': 7"),
        ("a.jsonl", '{"context": "a"}\n', "row 1: no column 'reference'"),
        ("a.jsonl", '{"context": "a", "chosen": "b"}\n', "row 1: no column 'rejected'"),
        ("a.jsonl", '{"id": 3.0, "context": "a", "reference": "b"}\n', "'id': 3.0 is neither"),
        ("a.jsonl", '{"group_id": NaN, "context": "a", "reference": "b"}\n', "'group_id': nan"),
        ("a.txt", "a", "is not a file this course reads"),
        ("a.parquet", "no parquet", "is not a parquet file"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words):
        load(write_file(tmp_path / name, content))


def test_nan_in_parquet_and_a_missing_file_are_refused(tmp_path):
    frame = pd.DataFrame({"context": ["a", None], "reference": ["b", "c"]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2, column 'context'"):
        load(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="there is no file"):
        load(tmp_path / "none.csv")


# --- ready-made pairs ------------------------------------------------------------------------

USER, GOOD, BAD = (
    {"role": "user", "content": "Summarise."}, {"role": "assistant", "content": "Good."},
    {"role": "assistant", "content": "Bad."},
)  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Summarise.", "chosen": "Good.", "rejected": "Bad."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"context": "Summarise.", "chosen": "Good.", "rejected": "Bad."},
    ],
    ids=["text", "TRL conversational", "TRL without a prompt", "with a note"],
)
def test_triplets_are_read_in_each_of_their_forms(tmp_path, record):
    pd.DataFrame([record]).to_parquet(tmp_path / "p.parquet")
    for row in (load_one(tmp_path, record), load(tmp_path / "p.parquet")[0][0]):
        sides = [row[name] for name in ("context", "reference", "rejected")]
        assert sides == ["Summarise.", "Good.", "Bad."]
        assert row["prompt"].startswith("Summarise the note." if "context" in record else sides[0])


def test_pairs_that_say_nothing_are_dropped_and_counted(tmp_path):
    sides = [("a", "a"), ("a", " "), ("", "b"), ("a", "b")]
    records = [{"prompt": f"p{i}", "chosen": c, "rejected": r} for i, (c, r) in enumerate(sides)]
    rows, dropped = load(write_jsonl(tmp_path / "a.jsonl", records))
    assert [row["id"] for row in rows] == ["row-4"]
    assert dropped == {"identical_sides": 1, "blank_rejected": 1, "blank_reference": 1}


@pytest.mark.parametrize(
    ("record", "words"),
    [({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "chosen and rejected may differ in"),
     ({"chosen": [GOOD, USER], "rejected": [GOOD, GOOD]}, "'chosen': an answer may hold")],
)  # fmt: skip
def test_conversations_that_differ_not_in_the_answer_alone_are_no_pair(tmp_path, record, words):
    with pytest.raises(DataError, match=f"row 1.*{words}"):
        load_one(tmp_path, record)


# --- chats -----------------------------------------------------------------------------------


def test_every_answer_of_a_chat_is_a_row_and_the_chat_is_their_group(tmp_path):
    messages = [
        {"role": "system", "content": "Be kind."}, USER, GOOD,
        {"role": "user", "content": "Shorter?"}, {"role": "assistant", "content": "G."},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "chat.jsonl", [{"id": "c7", "messages": messages}])
    (first, second), _ = load(path)
    assert (first["id"], first["prompt"]) == ("c7", "Be kind.\n\nSummarise.")
    assert (second["id"], second["reference"]) == ("c7-2", "G.")
    assert second["prompt"] == "Be kind.\n\nUser: Summarise.\n\nAssistant: Good.\n\nUser: Shorter?"
    assert first["group_id"] == second["group_id"]
    assert "Be kind" not in first["context"] + second["context"]


def test_sharegpt_and_trl_names_are_read_alike(tmp_path):
    said = [{"from": "human", "value": "Summarise."}, {"from": "gpt", "value": "Good."}]
    messages = load_one(tmp_path, {"messages": [USER, GOOD]})
    assert load_one(tmp_path, {"conversations": said}) == messages
    assert load_one(tmp_path, {"log": said}, {"messages": "log"}) == messages
    trl = load_one(tmp_path, {"prompt": [USER], "completion": [GOOD]})
    assert (trl["prompt"], trl["reference"]) == ("Summarise.", "Good.")


def test_parts_of_text_are_joined_tool_calls_skipped_and_chats_without_an_answer_counted(tmp_path):
    parts = [{"type": "text", "text": "Sum"}, {"type": "text", "text": "marise."}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    asked = [{"role": "user", "content": parts}, call, {"role": "tool", "content": "42"}]
    records = [{"messages": said} for said in ([*asked, GOOD], [USER], [], [GOOD])]
    (row,), dropped = load(write_jsonl(tmp_path / "a.jsonl", records))
    assert row["prompt"] == "User: Sum\nmarise.\n\nTool: 42"
    assert dropped == {"chat_without_answer": 3}


@pytest.mark.parametrize(
    ("messages", "words"),
    [("text", "column 'messages': str, not a list"), (None, "NoneType, not a list"),
     ([USER, {"role": "wizard", "content": "x"}], "message 2: the role is 'wizard'"),
     ([USER, {"role": "assistant", "content": None}], "message 2: None is not text"),
     ([USER, "x"], "message 2: 'x' is no object"),
     ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'} is not text")],
)  # fmt: skip
def test_bad_chats_are_named_by_row_and_message(tmp_path, messages, words):
    with pytest.raises(DataError, match=rf"row 1, .*{words}"):
        load_one(tmp_path, {"messages": messages})


# --- as a stage, and on real files -----------------------------------------------------------


def test_own_file_becomes_splits_through_the_stage(tmp_path):
    records = [
        {"context": f"Note {i // 2}", "reference": f"Summary {i}", "explanation": "LEAK"}
        for i in range(200)
    ]
    path = write_jsonl(tmp_path / "own.jsonl", records)
    result = prepare_data(*open_run(tmp_path, source="file", path=str(path)))
    splits = {name: result.read(name) for name in SPLITS}
    assert find_leaks(splits, "context") == []
    assert result.audit["references"] is None
    assert result.audit["splits"]["train"]["duplicate_contexts"] > 0
    assert all(row["style_group"] == "" and row["facts"] == "" for row in splits["test"])
    assert "LEAK" not in json.dumps(splits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"source": "clinic", "columns": NOTE}, "data.source is 'clinic'"),
     ({"source": "medhal", "encoding": "cp1252"}, "data.source is 'medhal'"),
     ({"source": "file"}, "data.path is empty"),
     ({"source": "file", "path": " ,b"}, r"no row that can be used: \{'blank_context': 1\}"),
     ({"source": "file", "path": "a,b,1\nc,d,1"}, r"a\.csv: the id '1' occurs twice")],
)  # fmt: skip
def test_a_stage_whose_source_cannot_be_used_is_refused_and_not_recorded(tmp_path, settings, words):
    if "path" in settings:  # the rows of a file
        head = "context,reference,id\n" if "1" in settings["path"] else "context,reference\n"
        settings = settings | {"path": str(write_file(tmp_path / "a.csv", head + settings["path"]))}
    recipe, run = open_run(tmp_path, **settings)
    with pytest.raises(DataError, match=words):
        prepare_data(recipe, run)
    assert "data" not in run.manifest["stages"]


@pytest.mark.parametrize("name", ["own.csv", "own.jsonl", "triplets.jsonl", "chats_openai.jsonl",
                                  "chats_sharegpt.json", "trl_conversational.jsonl"])  # fmt: skip
def test_the_samples_that_ship_are_read_and_none_of_their_rows_is_dropped(name):
    rows, dropped = load(project_root() / "data" / "samples" / name)
    assert len(rows) >= 4 and not dropped
    has_pairs = name in ("triplets.jsonl", "trl_conversational.jsonl")
    assert all(bool(row["rejected"]) == has_pairs for row in rows)


@needs_mts
def test_mts_dialog_is_read_with_its_own_column_names_and_cutting_it_is_refused(tmp_path):
    columns = {"id": "ID", "context": "dialogue", "reference": "section_text"}
    settings = {"source": "file", "path": str(REAL / "mts-dialog" / "training.csv")}
    recipe, run = open_run(tmp_path, columns=columns, **settings)
    with pytest.raises(DataError, match=r"exceed model.max_length of 640 tokens"):
        prepare_data(recipe, run)
    audit = json.loads(run.path("data/audit.json").read_text("utf-8"))
    assert audit["splits"]["train"]["labels_all_lost"] > 0
    result = prepare_data(*open_run(tmp_path, columns=columns, max_chars=600, **settings))
    assert result.audit["dropped"]["longer_than_max_chars"] > 300
    assert sum(result.counts.values()) + sum(result.audit["dropped"].values()) == 1201
    assert result.audit["leaks"]["near_duplicates"] == []


@needs_medec
def test_medec_becomes_pairs_of_a_corrected_and_a_wrong_sentence():
    columns = {"id": "Text ID", "context": "Corrected Text", "chosen": "Corrected Sentence",
               "rejected": "Error Sentence"}  # fmt: skip
    rows, dropped = load(REAL / "medec" / "validation.csv", columns)
    assert len(rows) == 319 and dropped == {"identical_sides": 255}
    assert all(row["reference"] != row["rejected"] for row in rows)
