"""Calls of tools are found in an answer, whatever a template puts around them."""

from __future__ import annotations

import byte_level
import pytest
import small_models

from turret.tasks.chat_template import ChatTemplate
from turret.tasks.tool_calls import Call, CallFormat, may_begin, read_calls

LLAMA = CallFormat("", "", "parameters")
MISTRAL = CallFormat("[TOOL_CALLS] [", "]", "arguments")
QWEN = CallFormat("\n<tool_call>\n", "\n</tool_call>", "arguments")


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (QWEN, 'Yes.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Yes.\n", [("f", '{"a": 1}')]),
        (QWEN, '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "arguments": {}}', "",
         [("f", "{}"), ("g", "{}")]),
        (MISTRAL, '[{"name": "f", "arguments": {"a": [1]}}]', "", [("f", '{"a": [1]}')]),
        (LLAMA, '{"name": "g", "parameters": {"a": {"b": "é"}}}', "", [("g", '{"a": {"b": "é"}}')]),
        (QWEN, '{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        (QWEN, '{"name": "f"} and {"name": "f", "arg', '{"name": "f"} and {"name": "f", "arg', []),
        (QWEN, '{"name": "f", "arguments": {"a": 1e400}}', '{"name": "f", "arguments": {"a": 1e400}}', []),
        (QWEN, '{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {"a": NaN}}', []),
        (QWEN, "{" * 4000, "{" * 4000, []),
        (QWEN, '{"a":' * 4000, '{"a":' * 4000, []),
    ],
)  # fmt: skip
def test_calls_of_known_tools_are_read_and_the_rest_stays_text(form, text, content, calls) -> None:
    found = read_calls(text, {"f", "g"}, form)
    assert found.calls == [Call(*each) for each in calls]
    assert found.content == content


def test_the_format_of_a_template_is_found_by_rendering_a_call() -> None:
    form = ChatTemplate(byte_level.tokenizer()).call_format
    assert (form.before, form.after, form.key) == ("<tool_call>\n", "\n</tool_call>", "arguments")
    assert ChatTemplate(small_models.tokenizer("llama")).call_format == CallFormat(), "it writes calls as JSON"


def test_text_is_held_back_from_where_a_call_may_begin() -> None:
    assert may_begin("Yes. <tool", QWEN) == 5
    assert may_begin("Yes.", QWEN) == 4
    assert may_begin("a {b", LLAMA) == 2
