"""From tables of conversations to turns: the formats, what is left out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chats
import pytest
from small_tables import load, write_csv, write_jsonl

from turret.data import Conversation, Prompt, Turn
from turret.data.dataset import read_dataset, read_inputs
from turret.errors import DataError
from turret.recipe import Data, Task
from turret.tasks import schemas
from turret.tasks.chat import Chat

TURNS = tuple(Turn(role, content) for role, content in chats.ASKED)
TOOL = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"city": "Lima"}}


def conversations(path: Path, **fields: Any) -> list[Any]:
    """Every conversation of a table, in the order of its rows."""
    data = load(path, **fields, test=1)
    return sorted([*data.train, *data.test], key=lambda each: each.input)


def rows(make: Any, count: int = 4) -> list[Any]:
    return [make(number) for number in range(count)]


def said(number: int) -> list[tuple[str, str]]:
    return [("user", f"Question {number}?"), *chats.ASKED[1:]]


# --- formats ---------------------------------------------------------------------------------------------------------


def test_messages_and_sharegpt_give_the_same_turns(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", rows(lambda i: {"messages": chats.messages(said(i)), "origin": "x"}))
    two = write_jsonl(tmp_path / "b.jsonl", rows(lambda i: {"conversations": chats.sharegpt(said(i))}))
    assert conversations(one) == conversations(two)
    data = load(one)
    assert (data.kind, data.columns) == ("chat", {"messages": "messages"})
    assert any(note == "guessed: chat, messages is column 'messages'; not used: origin" for note in data.notes)


def test_an_instruction_its_input_and_its_output_are_one_exchange(tmp_path: Path) -> None:
    table = write_jsonl(
        tmp_path / "alpaca.jsonl",
        rows(lambda i: {"instruction": f"Do {i}.", "input": "" if i % 2 else "this", "output": f"Done {i}."}),
    )
    found = conversations(table)
    assert [each.turns[0].content for each in found] == ["Do 0.\n\nthis", "Do 1.", "Do 2.\n\nthis", "Do 3."]
    assert found[1].turns[1] == Turn("assistant", "Done 1.")
    assert load(table).columns == {"prompt": "instruction", "completion": "output", "input": "input"}


def test_a_conversation_may_be_json_in_a_cell_of_a_csv_file(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "a.csv", rows(lambda i: {"messages": json.dumps(chats.messages(said(i)))}))
    assert conversations(table)[0].turns[1:] == TURNS[1:]


def test_prompts_and_completions_may_be_lists_of_turns(tmp_path: Path) -> None:
    made = rows(lambda i: {"prompt": chats.messages(said(i)[:3]), "completion": chats.messages(said(i)[3:])})
    table = write_jsonl(tmp_path / "a.jsonl", made)
    assert conversations(table, kind="chat")[0].turns[1:] == TURNS[1:]


def test_a_system_turn_and_tools_may_have_columns_of_their_own(tmp_path: Path) -> None:
    made = rows(lambda i: {"messages": chats.messages(said(i)), "system": "Be brief.", "tools": json.dumps([TOOL])})
    found = conversations(write_jsonl(tmp_path / "a.jsonl", made))[0]
    assert found.turns[0] == Turn("system", "Be brief.")
    assert json.loads(found.tools) == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize(
    "turns",
    [
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}]},
            {"role": "tool", "content": "mild"},
            {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "mild."}]},
        ],
        [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "mild"},
            {"from": "gpt", "value": "It is mild."},
        ],
    ],
    ids=["openai", "sharegpt"],
)  # fmt: skip
def test_calls_of_tools_are_kept_in_one_form(tmp_path: Path, turns: list[Any]) -> None:
    table = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}] * 3)
    found = conversations(table)[0]
    assert json.loads(found.turns[1].tool_calls) == [{"type": "function", "function": CALL}]
    assert [turn.role for turn in found.turns] == ["user", "assistant", "tool", "assistant"]
    assert found.output == "It is mild."


def test_half_characters_in_calls_and_tools_become_whole_ones(tmp_path: Path) -> None:
    call = {"id": "\ud800", "function": {"name": "f", "arguments": {"x": "\ud800"}}}
    turns = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "f\ud800", "tool_call_id": "\ud800", "content": "r"},
        {"role": "assistant", "content": "done"},
    ]
    tools = [{"name": "f", "description": "\ud800"}]
    table = rows(lambda i: {"messages": [{"role": "user", "content": f"Hi {i}"}, *turns], "tools": tools})
    one, *_ = conversations(write_jsonl(tmp_path / "a.jsonl", table))
    assert one.turns[1].message()["tool_calls"][0]["function"]["arguments"] == {"x": "\ufffd"}
    assert (one.turns[2].name, one.turns[2].call_id) == ("f\ufffd", "\ufffd")
    assert json.loads(one.tools)[0]["function"]["description"] == "\ufffd"


def test_conversations_that_do_not_fit_in_memory_are_the_same(tmp_path: Path) -> None:
    made = rows(lambda i: {"messages": chats.messages(said(i)), "tools": [TOOL]})
    source = Data(source=str(write_jsonl(tmp_path / "a.jsonl", made)), test=1)
    kept, spilled = read_dataset(source, schemas(Task())), read_dataset(source, schemas(Task()), memory=10)
    assert list(kept.train) == list(spilled.train)
    assert kept.digest == spilled.digest


def test_questions_without_answers_are_read_for_prediction(tmp_path: Path) -> None:
    table = write_jsonl(
        tmp_path / "a.jsonl", [{"messages": chats.messages(said(0)[:3])}, {"messages": chats.messages(said(0))}]
    )
    schema = Chat.schema()
    prompt = Prompt((Turn("user", "Question 0?"), *TURNS[1:3]))
    assert read_inputs(Data(source=str(table)), schema) == [prompt, prompt]
    plain = write_csv(tmp_path / "b.csv", [{"instruction": "Do it.", "input": "now"}])
    assert read_inputs(Data(source=str(plain)), schema) == [Prompt((Turn("user", "Do it.\n\nnow"),))]


# --- what is left out ------------------------------------------------------------------------------------------------


def test_turns_after_the_last_answer_and_rows_without_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    made = [{"messages": chats.messages(said(i))} for i in range(4)]
    made += [{"messages": chats.messages([*said(9), ("user", "Thanks!")])}, {"messages": chats.messages(said(8)[:1])}]
    data = load(write_jsonl(tmp_path / "a.jsonl", made))
    assert len(data.train) + len(data.test) == 5
    assert all(each.turns[-1].role == "assistant" for each in data.train if isinstance(each, Conversation))
    assert any("turns after the last answer are left out in 1 of 6 conversations" in n for n in data.notes)
    assert any("1 of 6 rows without a question and its answer in 'messages' is left out" in note for note in data.notes)


def test_answers_before_the_first_question_are_left_out_and_counted(tmp_path: Path) -> None:
    greeting = ("assistant", "Hello, how can I help?")
    made = [{"messages": chats.messages(said(i))} for i in range(4)]
    made += [{"messages": chats.messages([("system", "Be kind."), greeting, *said(9)])}]
    made += [{"messages": chats.messages([greeting])}]
    path = write_jsonl(tmp_path / "a.jsonl", made)
    data = load(path)
    assert len(data.train) + len(data.test) == 5
    roles = {
        tuple(turn.role for turn in each.turns) for each in (*data.train, *data.test) if isinstance(each, Conversation)
    }
    assert all("assistant" not in each[: each.index("user")] for each in roles)
    assert any("answers that begin a conversation are left out in 1 of 6 conversations" in note for note in data.notes)
    assert any("1 of 6 rows without a question and its answer in 'messages' is left out" in note for note in data.notes)
    asked = read_inputs(Data(source=str(path)), Chat.schema())
    assert isinstance(asked[4], Prompt)
    assert [turn.role for turn in asked[4].turns][:2] == ["system", "user"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([{"role": "narrator", "content": "x"}], "turn 1: the role is 'narrator': expected system, user"),
        (["hello"], "turn 1: expected an object with role and content, found str"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "turn 1: a part of the content is no text"),
        ([{"from": "function_call", "value": "weather()"}], "is not JSON: expected a call of a tool"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "turn 1: a tool call needs a name"),
        ("not a list", "'not a list' is not JSON: expected a conversation"),
        (7, "expected a list of turns such as"),
    ],
)
def test_a_wrong_conversation_is_refused_with_its_line_and_turn(tmp_path: Path, turns: Any, says: str) -> None:
    table = write_jsonl(tmp_path / "a.jsonl", [{"messages": chats.messages(said(0))}, {"messages": turns}])
    with pytest.raises(DataError) as refused:
        load(table)
    assert says in str(refused.value)
    assert "a.jsonl line 2" in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_column_that_looks_like_input_is_refused_until_it_is_named_or_dropped(tmp_path: Path) -> None:
    made = rows(lambda i: {"question": f"Who is {i}?", "answer": f"It is {i}.", "context": f"about {i}"})
    table = write_jsonl(tmp_path / "a.jsonl", made)
    with pytest.raises(DataError, match=r"the column 'context', which looks like input, and generate does not use it"):
        load(table)
    assert load(table, ignore=["context"]).kind == "generate"
    named = load(table, kind="chat", input="context")
    assert named.columns["input"] == "context"


def test_named_columns_do_not_hide_an_input_that_is_not_used(tmp_path: Path) -> None:
    made = rows(lambda i: {"instruction": "Rewrite.", "input": f"text {i}", "output": f"better {i}"})
    table = write_jsonl(tmp_path / "a.jsonl", made)
    with pytest.raises(DataError, match=r"drop it with data\.ignore = \['input'\]"):
        load(table, prompt="instruction", completion="output")


def test_a_column_without_values_is_no_input(tmp_path: Path) -> None:
    made = rows(lambda i: {"question": f"Who is {i}?", "answer": f"It is {i}.", "context": ""})
    assert load(write_jsonl(tmp_path / "a.jsonl", made)).kind == "generate"


@pytest.mark.parametrize(("fields", "says"), [
    ({"ignore": ["nothing"]}, "there is no column 'nothing'"),
    ({"ignore": ["input"], "input": "input"}, "data.ignore and data.input both name the column 'input'"),
    ({"kind": "generate", "messages": "output"}, "data.messages does not belong to generate"),
    ({"kind": "chat", "text": "output"}, "data.text does not belong to chat"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, fields: Any, says: str) -> None:
    made = rows(lambda i: {"instruction": f"Do {i}.", "input": "x", "output": f"y {i}"})
    with pytest.raises(DataError, match=says):
        load(write_jsonl(tmp_path / "a.jsonl", made), **fields)


def test_a_table_whose_prompts_are_nearly_constant_is_refused(tmp_path: Path) -> None:
    made = rows(lambda i: {"instruction": "Rewrite it.", "input": f"text {i}", "output": f"better {i}"}, 40)
    table = write_jsonl(tmp_path / "a.jsonl", made)
    with pytest.raises(DataError, match=r"of 32 training examples have the same input \(column 'instruction'\)"):
        load(table, ignore=["input"])
    assert len(load(table).train) == 32  # with the input every prompt differs
    prompts = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Go", "completion": f"on {i}"} for i in range(40)])
    with pytest.raises(DataError, match="have the same input"):
        load(prompts)
