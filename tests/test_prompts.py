"""What stands in a prompt file is read as it stands, or is one line that names file and line; what a row may be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from opd.api import execute
from opd.assembly import load_data, not_held_out
from opd.context import Context
from opd.curricula.shuffled import Shuffled
from opd.errors import DataError, RecipeError
from opd.prompts import Prompt, load_prompts, split_held_out
from opd.prompts.file import FilePrompts
from opd.prompts.inline import InlinePrompts
from opd.recipe import parse_recipe
from opd.verifiers.base import as_text
from opd.verifiers.exact_match import ExactMatch
from tests.checkpoints import logged, make, models  # noqa: F401
from tests.test_loop import TEXTS

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}


def file(tmp_path: Path, content: str | bytes, name: str = "p.jsonl") -> FilePrompts:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return FilePrompts(path=str(path))


BAD_LINES = [
    (r'{"prompt": "\ud800"}', "half a character"),
    (r'{"prompt": "a", "other": [{"x\udfff": 1}]}', "half a character"),
    ('{"prompt": "a", "n": ' + "1" * 6000 + "}", "6000 digits"),
    ('{"prompt": "a", "n": NaN}', "NaN is no number"),
    ('{"prompt": "a", "n": -Infinity}', "-Infinity is no number"),
    ('{"prompt": "a", "n": 1e999}', "1e999 is too large"),
    ('{"prompt": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ('{"prompt": "a", "n": ' + "[" * 300 + "]" * 300 + "}", "nested deeper than 100 levels"),
    ('{"prompt": "a", "prompt": "b"}', "key 'prompt' stands there twice"),
    ('{"prompt": "a", "n": {"x": 1, "x": 2}}', "key 'x' stands there twice"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_line_that_cannot_be_read_is_named_or_skipped(line, message, tmp_path):
    source = file(tmp_path, f'{{"prompt": "first"}}\n{line}\n{{"prompt": "last"}}\n')
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{message}") as error:
        load_prompts([source])
    assert len(str(error.value)) < 300
    bad: list[DataError] = []
    assert [p.view() for p in load_prompts([source], bad)] == ["first", "last"]
    assert len(bad) == 1


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}\r\n', "p.jsonl"),
        (b"\xef\xbb\xbfone\r\n\r\ntwo\r\n", "p.txt"),
        (b"\xef\xbb\xbfprompt\r\none\r\n\r\ntwo\r\n", "p.csv"),
    ],
)
def test_byte_order_marks_and_line_ends_of_other_systems_are_not_text(content, name, tmp_path):
    assert [p.view() for p in file(tmp_path, content, name).load()] == ["one", "two"]


def test_cells_of_a_csv_file_are_texts_as_they_stand(tmp_path):
    rows = file(tmp_path, 'prompt,answer\nx,7\n"two\nlines",\nz,NA\nz,null\nz,007\nz,1e5\n', "p.csv").load()
    assert [p.fields["answer"] for p in rows] == ["7", "", "NA", "null", "007", "1e5"]
    assert rows[1].view() == "two\nlines"
    assert [p.where.rpartition(":")[2] for p in rows] == ["2", "3", "5", "6", "7", "8"]
    verdicts = [ExactMatch(pattern="#(.*)").score(p, text) for p, text in zip(rows, ("#7", "", "#NA"), strict=False)]
    assert verdicts == [1.0, None, 1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,1,2", "has 3 cells and the file 2 columns"),
        ("x", "has 1 cells and the file 2 columns"),
        ('"x"y,1', "not CSV"),
        (b"\xff,1", "not UTF-8"),
    ],
)
def test_a_row_of_a_csv_file_that_does_not_fit_is_named_or_skipped(row, message, tmp_path):
    row = row if isinstance(row, bytes) else row.encode()
    source = file(tmp_path, b"prompt,answer\na,1\n" + row + b"\nb,2\n", "p.csv")
    with pytest.raises(DataError, match=rf"p\.csv:3: .*{message}"):
        load_prompts([source])
    bad: list[DataError] = []
    assert [p.view() for p in load_prompts([source], bad)] == ["a", "b"]
    assert len(bad) == 1


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="two columns have one name"):
        file(tmp_path, "prompt,prompt\na,b\n", "p.csv").load()


def test_parquet_keeps_its_types_beside_empty_cells(tmp_path):
    table = {"prompt": [[USER], [USER], [USER]], "answer": [7, None, 2**60 + 1], "share": [0.5, None, 2.0]}
    parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    rows = FilePrompts(path=str(tmp_path / "p.parquet")).load()
    assert [p.fields["answer"] for p in rows] == [7, None, 2**60 + 1]
    assert [type(p.fields["answer"]) for p in rows] == [int, type(None), int]
    assert rows[0].view() == [USER]
    assert [ExactMatch().score(p, "7") for p in rows] == [1.0, None, 0.0]


def test_numbers_read_as_text_do_not_depend_on_the_type_that_a_file_gave_them():
    assert [as_text(v) for v in (7, 7.0, "7", "7.0", 0.5, -3.0, 1e300)] == ["7", "7", "7", "7.0", "0.5", "-3", "1e+300"]
    row = Prompt("a", {"prompt": "x", "answer": ["7"]}, where="here:1")
    with pytest.raises(DataError, match=r"here:1: column 'answer' holds list"):
        ExactMatch().check_prompts([row])
    nothing_found = Prompt("a", {"prompt": "x", "answer": " "})
    assert ExactMatch(pattern="#(.*)").score(nothing_found, "no mark") is None


def inline(*rows, **settings):
    return InlinePrompts(prompts=[{"prompt": row} if not isinstance(row, dict) else row for row in rows], **settings)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"from": "human", "value": "hi"}], "ShareGPT"),
        ([], "is empty"),
        ([{"role": "user", "content": " "}], "is empty"),
        ([{"role": "user"}], "message 0"),
        ([USER, {"role": "assistant", "content": None}], "message 1"),
        ([{"role": "user", "content": 3}], "message 0"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]}], "part 'audio'"),
        ([["hi"]], "holds list"),
        (None, "holds NoneType"),
    ],
)
def test_messages_that_cannot_be_a_prompt_are_refused_with_their_row(value, message):
    with pytest.raises(DataError, match=rf"prompts\[1\]: .*{message}"):
        inline("fine", value).load()


@pytest.mark.parametrize("role", ["assistant", "model"])
def test_a_row_that_ends_with_the_answer_may_be_refused(role):
    with pytest.raises(DataError, match=r"prompts\[1\]: .*prompts.last_answer at cut"):
        inline("fine", [USER, {"role": role, "content": "hello"}], last_answer="refuse").load()


def test_messages_are_found_where_a_row_has_no_prompt(tmp_path):
    """Rows of fine-tuning data are prompts as they stand, and their last answer is the response."""
    turns = [USER, REPLY, USER, REPLY]
    for name, text in (
        ("p.jsonl", json.dumps({"messages": turns})),
        ("p.csv", 'messages\n"' + json.dumps(turns).replace('"', '""') + '"'),
    ):
        (row,) = file(tmp_path, text, name).load()
        assert (row.column, row.view(), row.fields["response"]) == ("messages", turns[:3], "hello")
        assert row.columns == ["messages"]
    (row,) = inline({"prompt": "x", "messages": turns}).load()
    assert (row.view(), row.fields["messages"]) == ("x", turns)
    (row,) = inline({"text": "x", "messages": turns}, column="text").load()
    assert row.view() == "x"


def test_messages_name_only_columns_that_somebody_wrote(tmp_path):
    with pytest.raises(DataError, match=r"no column 'prompt'; the row has \['question', 'solution'\]\. Name the one "):
        file(tmp_path, '{"question": "a", "solution": "b"}').load()
    (row,) = inline({"prompt": [USER, REPLY], "solution": "b"}, answer="solution").load()
    assert row.columns == ["prompt", "solution"]
    with pytest.raises(DataError, match=r"no column 'hint'; the row has \['prompt', 'solution'\]"):
        row.view("hint")
    with pytest.raises(DataError, match=r"no column 'reply'.* holds the answer with prompts.answer"):
        inline({"prompt": "x"}, answer="reply").load()


def test_rows_that_are_only_numbered_do_not_clash():
    prompts = load_prompts([inline("a", "b"), inline("c"), inline("d")])
    assert len({prompt.id for prompt in prompts}) == 4


def test_messages_may_call_tools_and_have_parts():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    turns = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, call, {"role": "tool", "content": "3"}]
    assert inline(turns).load()[0].view() == turns


def test_the_last_answer_is_cut_and_offered_as_the_response():
    rows = inline(
        [USER, REPLY],
        [USER],
        {"prompt": [USER, REPLY], "response": "own"},
        {"prompt": [USER, REPLY], "response": None},
        "text",
        last_answer="cut",
    ).load()
    assert [p.view() for p in rows] == [[USER], [USER], [USER], [USER], "text"]
    assert [p.fields.get("response") for p in rows] == ["hello", None, "own", "hello", None]
    with pytest.raises(DataError, match="is empty"):
        inline([REPLY], last_answer="cut").load()
    with pytest.raises(DataError, match="end with two answers"):
        inline([USER, REPLY, REPLY], last_answer="cut").load()


def drawn(sources, steps, per_step=4, seed=0):
    course = Shuffled().build(load_prompts(sources), per_step, Context(torch.device("cpu"), seed=seed))
    return [prompt for step in range(steps) for prompt in course.next(step, {}, None).prompts]


def of(letter, count, **settings):
    return InlinePrompts(prompts=[{"id": f"{letter}{i}", "prompt": "x"} for i in range(count)], **settings)


def test_weights_share_out_the_draws_however_many_rows_a_source_has():
    prompts = drawn([of("a", 40, weight=3), of("b", 2, weight=1)], 40)
    counts = Counter(prompt.id[0] for prompt in prompts)
    assert counts == {"a": 120, "b": 40}
    for step in range(40):
        assert Counter(p.id[0] for p in prompts[4 * step : 4 * step + 4]) == {"a": 3, "b": 1}
    assert set(Counter(p.id for p in prompts if p.id[0] == "a").values()) == {3}
    assert set(Counter(p.id for p in prompts if p.id[0] == "b").values()) == {20}
    unweighted = Counter(p.id[0] for p in drawn([of("a", 40), of("b", 2)], 42))
    assert unweighted == {"a": 160, "b": 8}


def test_a_weighted_step_does_not_depend_on_the_steps_before():
    sources = [of("a", 5, weight=0.7), of("b", 3, weight=0.2), of("c", 9, weight=0.1)]
    course = Shuffled().build(load_prompts(sources), 4, Context(torch.device("cpu"), seed=1))
    later = [prompt.id for prompt in course.next(6, {}, None).prompts]
    assert later == [prompt.id for prompt in drawn(sources, 7, seed=1)[24:]]


def test_held_out_prompts_that_are_trained_on_are_counted_in_one_line():
    def rows(*texts):
        return {"kind": "inline", "prompts": [{"prompt": text} for text in texts]}

    def warnings(held_out, training=None):
        recipe = parse_recipe(
            {
                "student": {"model": "a"},
                "teacher": {"model": "b"},
                "prompts": training or rows("one", "two", "three"),
                **({"evaluation": {"prompts": held_out}} if held_out else {}),
            }
        )
        return not_held_out(recipe, *load_data(recipe))

    assert warnings(rows("four", "five")) == []
    assert warnings(None, rows("one", "one", *map(str, range(40)))) == [], "a share of the prompt set"
    (line,) = warnings(rows("four", "two", "one"))
    assert line.startswith("evaluation.prompts: 2 of 3 are training prompts too (")
    assert "\n" not in line
    # A text is a message of the user, and a row the same whatever column is looked at.
    assert warnings(rows([{"role": "user", "content": "two"}, {"role": "user", "content": "six"}])) == []
    assert len(warnings(rows([{"role": "user", "content": "two"}]))) == 1
    row = {"id": "x", "prompt": "seven", "question": "eight"}
    same, other = ({"kind": "inline", "prompts": [r]} for r in (row, {**row, "question": "nine"}))
    for held_out, expected in ((same, 1), (other, 0)):
        assert len(warnings({**held_out, "column": "question"}, same)) == expected


def test_weights_that_change_nothing_are_refused():
    with pytest.raises(DataError, match=r"prompts\.1 has no weight"):
        load_prompts([of("a", 2, weight=1), of("b", 2)])
    recipe = parse_recipe(
        {
            "student": {"model": "a"},
            "teacher": {"model": "b"},
            "prompts": json.loads(of("a", 2).model_dump_json()),
            "evaluation": {"prompts": [json.loads(of("b", 2, weight=1).model_dump_json())]},
        }
    )
    with pytest.raises(RecipeError, match="'weight' is for training"):
        load_data(recipe)


def test_files_of_one_name_are_used_together(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    prompts = load_prompts([FilePrompts(path=str(tmp_path / folder / "p.jsonl")) for folder in ("a", "b")])
    assert [prompt.id for prompt in prompts[:2]] == ["p-1", "p-2"]
    assert len({prompt.id for prompt in prompts}) == 4


def test_a_column_that_is_added_replaces_none_of_a_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "task": "code"}\n')
    path = str(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match=r"has a column 'task' of its own.*prompts\.add"):
        load_prompts([FilePrompts(path=path, add={"task": "math"})])
    assert load_prompts([FilePrompts(path=path, add={"task": "code", "kind": "x"})])[0].fields["kind"] == "x"


def test_one_row_cannot_be_two_sets(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n')
    with pytest.raises(DataError, match="has one row"):
        split_held_out(load_prompts([FilePrompts(path=str(tmp_path / "p.jsonl"))]), 1, 0)


def test_bad_rows_are_named_and_skipped_only_when_asked(make, tmp_path, capsys):  # noqa: F811
    rows = [json.dumps({"prompt": text}) for text in TEXTS]
    rows[3:3] = ["{oops", json.dumps({"question": "x"}), json.dumps({"prompt": "1" * 50}), json.dumps({"prompt": " "})]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    changes = {"whole": {"prompts": {"path": str(path)}}, "max_prompt_tokens": 20, "steps": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl:4: not JSON"):
        execute(make("strict", **changes), quiet=True)
    assert execute(make("run", skip_bad_prompts=True, **changes), quiet=True).summary["steps"] == 1
    skipped = [line for line in capsys.readouterr().err.splitlines() if "skipped a row" in line]
    assert [line.split("rows.jsonl:")[1].split(":")[0] for line in skipped] == ["4", "5", "7", "6"]
    path.write_text("{oops")
    with pytest.raises(DataError, match=r"no row can be used; the first: .*rows\.jsonl:1"):
        execute(make("none", skip_bad_prompts=True, **changes), quiet=True)


def test_a_row_without_the_teachers_view_is_found_before_training(make):  # noqa: F811
    rows = [*({"prompt": text, "hint": "h"} for text in TEXTS[:-1]), {"prompt": TEXTS[-1]}]
    recipe = make("run", prompts={"prompts": rows}, whole={"teacher": {"kind": "self", "sees": "hint"}})
    with pytest.raises(DataError, match=r"prompts\[19\]: no column 'hint'"):
        execute(recipe, quiet=True)
    assert logged(recipe) == 0
