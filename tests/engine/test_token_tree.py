"""What rows have in common is read once, and their scores are those of rows that are read alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from turret import bases
from turret.engine.runner import LEAST, Node, Runner, token_tree
from turret.engine.sequence import Prefill

SHARED = {"llama": True, "qwen3": True, "gpt2": True, "mistral": False, "gemma2": False}  # False: windows of attention
PROMPT = [3 + place % 40 for place in range(70)]
ROWS = [
    ([*PROMPT, 7, 8], ([5], [6, 9], [6, 9, 4])),  # two questions about one text
    ([*PROMPT, 7, 9, *PROMPT[:40]], ([5, 2], [11], [5])),
    ([*PROMPT, 7, 9, *PROMPT[:40]], ([5, 2], [12])),  # the second again
    ([4, 5], ([6],)),  # another text
]


def paths(nodes: Sequence[Node], before: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Node]]:
    for node in nodes:
        assert node.start == len(before)
        assert len(node.ids) > 0
        yield (*before, *node.ids), node
        yield from paths(node.children, (*before, *node.ids))


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=6)),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
@settings(deadline=None)
def test_each_row_is_one_path(drawn: list[tuple[int, int, list[int]]], shared: bool) -> None:
    rows = [[*range(10, 10 + LEAST * long), *rest] for _, long, rest in drawn]
    slots = [slot for slot, _, _ in drawn]
    nodes = token_tree(rows, slots, shared=shared)
    last: dict[int, tuple[int, ...]] = {}
    for path, node in paths(nodes):
        assert len({slots[row] for row in node.rows}) == 1
        for row in node.rows:
            assert tuple(rows[row][: node.end]) == path
            last[row] = max(last.get(row, ()), path, key=len)
    assert [last[row] for row in range(len(rows))] == [tuple(each) for each in rows]
    of_nodes = [slots[node.rows[0]] for node in nodes]
    assert of_nodes == sorted(of_nodes)
    read, whole = sum(len(node.ids) for _, node in paths(nodes)), sum(map(len, rows))
    assert read <= whole if shared else read == whole


def test_a_text_and_a_question_are_read_once() -> None:
    text, question = list(range(100)), list(range(200, 250))
    rows = [[*text, *question, 5], [*text, *question, 6], [*text, *range(300, 340), 5], [*text, *range(300, 340), 6]]
    read = [len(node.ids) for _, node in paths(token_tree(rows, [0] * 4))]
    assert sorted(read) == [1, 1, 1, 1, 40, 50, 100]


def test_few_tokens_are_read_again_since_a_pass_costs_more() -> None:
    (first, second) = token_tree([[*range(LEAST - 1), 100], [*range(LEAST - 1), 101]], [0, 0])
    assert len(first.ids) == len(second.ids) == LEAST
    assert not first.children


@pytest.mark.parametrize("most", [None, 40])
@pytest.mark.parametrize("family", SHARED)
def test_branches_have_the_log_probabilities_of_transformers(
    family: str, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most is not None:
        monkeypatch.setattr("turret.engine.runner.PROMPT_PASS", most)
    folder = small_models.save_base(family, tmp_path / family)
    runner = Runner(bases.load(str(folder), dtype="float32"))
    try:
        read: list[int] = []
        body = runner._body
        runner._body = lambda rows, steps: (read.append(sum(len(row.ids) for row in rows)), body(rows, steps))[1]  # type: ignore[method-assign]
        found = runner.run([Prefill(ids, branches=branches) for ids, branches in ROWS]).scores
        assert not len(runner.cache), "the slots of the shared tokens are free again"
    finally:
        runner.close()
    alone = sum(len(ids) + len(branch) - 1 for ids, branches in ROWS for branch in branches)
    assert sum(read) < alone / 3 if SHARED[family] else sum(read) == alone
    assert most is None or max(read) <= max(most, *(len(ids) + 2 for ids, _ in ROWS))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (ids, branches), scores in zip(ROWS, found, strict=True):
        for branch, score in zip(branches, scores, strict=True):
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([[*ids, *branch]])).logits[0].double().log_softmax(-1)
            own = logprobs[len(ids) - 1 : -1].gather(1, torch.tensor(branch)[:, None]).sum()
            assert score == pytest.approx(float(own), abs=1e-4)


def test_a_control_notices_tokens_that_are_not_those_before(tmp_path: Path) -> None:
    """The same branches after another text have other probabilities, by more than the tolerance above."""
    runner = Runner(bases.load(str(small_models.save_base("llama", tmp_path / "llama")), dtype="float32"))
    try:
        one, other = runner.run(
            [Prefill([*PROMPT, 7], branches=([5],)), Prefill([*reversed(PROMPT), 7], branches=([5],))]
        ).scores
    finally:
        runner.close()
    assert abs(one[0] - other[0]) > 1e-3
