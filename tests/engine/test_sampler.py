"""The next token: the reference is transformers' logits processors; samples depend only on the request's seed."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
import transformers
from decoding_rows import SETTINGS, Row
from pretend_gpu import OnCard, pretend_gpu
from small_models import build, tokenizer

from turret.engine.request import GenerationSettings, SamplingParams
from turret.engine.sampler import base_settings, choose, draw, draw_together, process_logits, resolve_settings
from turret.errors import BaseModelError, DataError

V = 50


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    ("settings", "processor"),
    [
        ({"repetition_penalty": 1.7}, transformers.RepetitionPenaltyLogitsProcessor(1.7)),
        ({"no_repeat_ngram_size": 2}, transformers.NoRepeatNGramLogitsProcessor(2)),
        ({"no_repeat_ngram_size": 3}, transformers.NoRepeatNGramLogitsProcessor(3)),
        ({"min_length": 9}, transformers.MinLengthLogitsProcessor(9, 5)),
        ({"min_length": 8}, transformers.MinLengthLogitsProcessor(8, 5)),
        ({"min_new_tokens": 4}, transformers.MinNewTokensLengthLogitsProcessor(5, 4, 5)),
        ({"min_new_tokens": 3}, transformers.MinNewTokensLengthLogitsProcessor(5, 3, 5)),
        ({"forced_eos": (5,), "max_tokens": 4}, transformers.ForcedEOSTokenLogitsProcessor(9, 5)),
        ({"forced_eos": (5,), "max_tokens": 5}, transformers.ForcedEOSTokenLogitsProcessor(10, 5)),
    ],
)
def test_adjusted_scores_equal_those_of_transformers_processors(settings: dict, processor: object) -> None:
    past = [3, 7, 3, 7, 9, 3, 7, 3]  # 5 of a prompt, 3 of an answer
    ours = scores()[None]
    theirs = processor(torch.tensor([past]), scores()[None])  # type: ignore[operator]
    process_logits(ours, {0: (GenerationSettings(**({"max_tokens": 99, "eos": (5,)} | settings)), past, 3)})
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7}, [transformers.TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [transformers.TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.6}, [transformers.TopPLogitsWarper(0.6)]),
        ({"temperature": 1.3, "top_k": 9, "top_p": 0.7},
         [transformers.TemperatureLogitsWarper(1.3), transformers.TopKLogitsWarper(9),
          transformers.TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_p": 1e-9}, [transformers.TopPLogitsWarper(1e-9)]),
    ],
)  # fmt: skip
def test_tokens_are_sampled_with_the_probabilities_of_transformers(settings: dict, warpers: list) -> None:
    wanted = scores()[None]
    for each in warpers:
        wanted = each(None, wanted)
    probabilities = wanted.softmax(-1)[0]
    generator, count = random.Random(1), 4000
    own = GenerationSettings(9, (1,), **settings)
    drawn = torch.bincount(torch.tensor([draw(scores(), own, generator) for _ in range(count)]), minlength=V) / count
    assert not drawn[probabilities == 0].any()
    assert (drawn - probabilities).abs().max() < 5 * (0.25 / count) ** 0.5


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    flat = torch.zeros(4000)
    drawn = {
        draw(flat, GenerationSettings(9, (1,), temperature=1.0, top_p=0.5), random.Random(seed)) for seed in range(300)
    }
    assert len(drawn) > 200


@pytest.mark.parametrize("temperature", [1.0, 0.02, 0.005])
def test_all_rows_at_once_sample_no_token_without_weight(temperature: float) -> None:
    """The weights of a row are not sorted: those that are zero stand before and behind the others."""
    settings = GenerationSettings(9, (1,), temperature=temperature)
    two = torch.full((4000,), -torch.inf)
    two[[1500, 3100]] = 0.0
    both = torch.stack([two, 4 * torch.randn(4000, generator=torch.Generator().manual_seed(0))])
    for seed in range(20):
        rows = [Row(settings, []), Row(settings, [])]
        for row in rows:
            row.random = random.Random(seed)
        alone = [draw(scores, settings, random.Random(seed)) for scores in both]
        assert draw_together(both, rows).tolist() == alone
        assert alone[0] in (1500, 3100)


def test_rows_of_a_batch_do_not_affect_each_other() -> None:
    settings = [
        GenerationSettings(9, (1,)),
        GenerationSettings(9, (1,), temperature=1.0, seed=3),
        GenerationSettings(9, (1,), temperature=1.0, seed=3, repetition_penalty=2.0),
        GenerationSettings(9, (1,), temperature=0.5, seed=4, top_k=3),
    ]
    alone = [choose(scores(7)[None], [Row(each, [1, 2])])[0] for each in settings]
    together = choose(scores(7)[None].repeat(4, 1), [Row(each, [1, 2]) for each in settings])
    assert together == alone


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_no_token_and_the_others_have_theirs(value: float) -> None:
    both = torch.stack([scores(), scores()])
    both[0, 3] = value
    assert choose(both, [Row(GenerationSettings(9, (1,)))] * 2) == [None, int(scores().argmax())]


def test_an_unsupported_generation_setting_of_the_base_is_an_error_that_names_it() -> None:
    model = build("llama", "generate")
    model.generation_config.suppress_tokens = [3]
    with pytest.raises(BaseModelError, match=r"sets suppress_tokens, which this engine does not support"):
        base_settings(model, tokenizer("llama"))


def test_options_override_the_adapters_settings_which_override_the_bases() -> None:
    own = GenerationSettings(128, (5,), repetition_penalty=1.5)
    task = type("Task", (), {"generation": {"max_new_tokens": 30, "num_beams": 2, "eos_token_id": 7}})()
    plain = resolve_settings(SamplingParams(), own, None, room=500, vocabulary=V)
    assert (plain.max_tokens, plain.num_beams, plain.eos, plain.repetition_penalty) == (128, 1, (5,), 1.5)
    by_task = resolve_settings(SamplingParams(), own, task, room=20, vocabulary=V)
    assert (by_task.max_tokens, by_task.num_beams, by_task.eos) == (20, 2, (7,))
    asked = SamplingParams(max_tokens=9, repetition_penalty=1.0, temperature=0.5, seed=4)
    by_option = resolve_settings(asked, own, task, room=20, vocabulary=V)
    assert (by_option.max_tokens, by_option.num_beams, by_option.repetition_penalty) == (9, 1, 1.0)
    assert (by_option.temperature, by_option.seed) == (0.5, 4)
    with pytest.raises(DataError, match="max_tokens = 21: the prompt leaves room for 20"):
        resolve_settings(SamplingParams(max_tokens=21), own, task, room=20, vocabulary=V)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"repetition_penalty": 0},
        {"num_beams": 17},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
        {"seed": "1"},
        {"num_beams": 2, "temperature": 0.5},
    ],
)
def test_an_option_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(DataError):
        SamplingParams(**wrong)


def test_top_p_or_top_k_without_a_temperature_samples_at_one() -> None:
    assert SamplingParams(top_p=0.5).effective_temperature == SamplingParams(top_k=3).effective_temperature == 1.0
    assert (
        SamplingParams(top_p=1.0).effective_temperature
        == SamplingParams(top_k=3, temperature=0).effective_temperature
        == SamplingParams(seed=3).effective_temperature
        == 0.0
    )


KINDS: list[dict] = [
    *SETTINGS,
    {"forced_eos": (5,), "max_tokens": 4},
    {"forced_bos": 7},
    {"min_length": 40, "repetition_penalty": 0.8, "temperature": 0.5},
    {"temperature": 1.0, "top_p": 1e-9},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": ((3, 4.0), (11, 6.0)), "repetition_penalty": 1.2},
    {"logit_bias": ((9, 100.0),)},
]


def test_the_tokens_of_all_rows_at_once_are_those_of_each_row_alone() -> None:
    """A GPU chooses so, with one wait."""
    kinds = [KINDS[row % len(KINDS)] for row in range(60)]
    alike = [{"temperature": 0.7}] * 8, [{"temperature": 0.7, "top_k": 3}] * 8, [{}] * 8
    for number, some in enumerate((kinds, *alike)):
        given = torch.stack([scores(100 * number + row) for row in range(len(some))])
        given[1] = torch.nan
        made = [
            GenerationSettings(**({"max_tokens": 99, "eos": (5,), "seed": row} | each)) for row, each in enumerate(some)
        ]
        past = [[3, 7, 3, 7, row % V, 3, 7, 3] for row in range(len(some))]
        rows, same = (
            [Row(each, own, new=row % 5) for row, (each, own) in enumerate(zip(made, past, strict=True))]
            for _ in range(2)
        )
        with pretend_gpu():
            found = choose(OnCard(given.clone()), rows)
        expected = [choose(own[None], [row])[0] for own, row in zip(given, same, strict=True)]
        assert found == expected
        assert found[1] is None
        assert len(set(found)) > 3


@pytest.mark.parametrize("gpu", [False, True])
def test_penalties_count_tokens_of_the_answer_alone_and_biases_are_added(gpu: bool) -> None:
    settings = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": ((7, 2.0), (9, -3.0))}
    given = scores(5)[None]
    expected = given[0].clone()
    expected[7] += 2.0 - 1.5 - 2 * 0.5  # twice in the answer
    expected[9] -= 3.0
    expected[4] -= 1.5 + 0.5
    with pretend_gpu() if gpu else nullcontext():
        rows = [Row(GenerationSettings(99, (5,), **settings), [4, 4, 9, 7, 4, 7], new=3)]
        choose(OnCard(given) if gpu else given, rows)
    torch.testing.assert_close(given[0], expected)
