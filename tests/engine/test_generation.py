"""Generated texts equal those of transformers' generate() for each adapter alone, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters_at_hand import alone
from batches import own_target_logits
from shelf import Shelf
from small_models import GENERATORS

from turret.engine import Done, Failed, Piece, SamplingParams
from turret.errors import Cancelled, DataError, NoRoom
from turret.tasks import task_from_spec

TEXTS = ("a great film", "why not", "the market in london fell by 12%", "x")


def shelf(family: str, **settings: Any) -> Shelf:
    made = Shelf(family, "generate")
    for seed, (name, method) in enumerate({"narrow": "lora", "wide": "wide", "prefix": "prefix"}.items(), 1):
        made.put(name, method, seed, **settings)
    return made


def reference(shelf: Shelf, name: str | None, text: str, **settings: Any) -> tuple[str, int, str]:
    """(text, tokens, reason) by transformers' own generate(), one row."""
    adapter = None if name is None else shelf.adapters[f"{name}@1"]
    model, base = alone(shelf.family, "generate", adapter), shelf.base()
    if adapter is None:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        own = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    else:
        task = task_from_spec(adapter.task, base.tokenizer)
        ids, own = task.encode_sources([text])[0].ids[None], dict(task.generation)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **(own | settings))
    row = out[0, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    eos = model.generation_config.eos_token_id if adapter is None else own["eos_token_id"]
    kept = row[: row.index(eos)] if eos in row else row
    said = base.tokenizer.decode(kept, skip_special_tokens=True).strip()
    return said, len(kept), "stop" if eos in row else "length"


@pytest.mark.slow
@pytest.mark.parametrize("family", GENERATORS)
def test_greedy_answers_of_a_mixed_batch_equal_each_alone(family: str) -> None:
    made = shelf(family)
    asked = [(name, text) for text in TEXTS for name in ("narrow", "wide", "prefix", None)]
    with made.engine(batch_tokens=64, running=5) as engine:
        tickets = [engine.submit("generate", text, name, SamplingParams(max_tokens=12)) for name, text in asked]
        for (name, text), ticket in zip(asked, tickets, strict=True):
            answer = ticket.result(30)
            got = answer["text"], answer["tokens"], answer["finish_reason"]
            assert got == reference(made, name, text, max_new_tokens=12), (name, text)
        assert engine.stats().cache_tokens == engine.stats().running == 0


def test_control_adapters_give_different_answers() -> None:
    made = shelf("llama")
    said = {reference(made, name, TEXTS[0]) for name in ("narrow", "wide", "prefix", None)}
    assert len(said) == 4


@pytest.mark.slow
@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("family", GENERATORS)
def test_beam_search_equals_transformers(family: str, beams: int) -> None:
    made = shelf(family)
    with made.engine() as engine:
        tickets = [
            (name, text, engine.submit("generate", text, name, SamplingParams(num_beams=beams, max_tokens=9)))
            for name in ("wide", "prefix", "narrow")
            for text in TEXTS[:2]
        ]
        other = engine.submit("generate", TEXTS[2], "narrow")
        for name, text, ticket in tickets:
            answer = ticket.result(30)
            got = answer["text"], answer["tokens"], answer["finish_reason"]
            assert got == reference(made, name, text, num_beams=beams, max_new_tokens=9), (name, text)
        assert other.result(30)["text"] == reference(made, "narrow", TEXTS[2])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"length_penalty": 2.0},
        {"length_penalty": -1.0, "early_stopping": "never"},
        {"early_stopping": True, "no_repeat_ngram_size": 2},
        {"forced_bos_token_id": 9, "forced_eos_token_id": 2, "min_length": 6},
        {"repetition_penalty": 1.8, "early_stopping": "never"},
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_settings_of_the_bases_generation_config_apply(settings: dict[str, Any], beams: int) -> None:
    made = shelf("bart")
    base = made.base()
    for name, value in settings.items():
        setattr(base.model.generation_config, name, value)
    with made.engine(base) as engine:
        for name in ("narrow", "wide"):
            for text in TEXTS:
                answer = engine.generate([text], name, SamplingParams(num_beams=beams))[0]
                if beams == 1:
                    wanted = {k: v for k, v in settings.items() if k not in ("length_penalty", "early_stopping")}
                else:
                    wanted = settings
                expected = reference(made, name, text, num_beams=beams, **wanted)
                assert (answer["text"], answer["tokens"], answer["finish_reason"]) == expected


def test_sampled_texts_depend_on_their_seed_and_not_on_other_requests() -> None:
    made = shelf("qwen3")
    options = {seed: SamplingParams(temperature=1.2, top_p=0.9, seed=seed, max_tokens=12) for seed in range(4)}
    with made.engine() as engine:
        first = {seed: engine.generate([TEXTS[0]], "wide", each)[0] for seed, each in options.items()}
    with made.engine(batch_tokens=40, running=3) as engine:
        crowd = [engine.submit("generate", text, name) for text in TEXTS for name in ("narrow", "prefix", None)]
        tickets = {seed: engine.submit("generate", TEXTS[0], "wide", each) for seed, each in options.items()}
        assert {seed: ticket.result(30) for seed, ticket in tickets.items()} == first
        assert all(ticket.result(30) for ticket in crowd)
    assert len({answer["text"] for answer in first.values()}) == 4


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_streamed_pieces_join_to_the_answer(family: str) -> None:
    made = shelf(family)
    with made.engine() as engine:
        for options in (SamplingParams(), SamplingParams(temperature=1.0, seed=1), SamplingParams(num_beams=2)):
            ticket = engine.submit("generate", TEXTS[0], "narrow", options)
            pieces = list(ticket.stream())
            assert (
                "".join(pieces) == ticket.result()["text"] == engine.generate(TEXTS[:1], "narrow", options)[0]["text"]
            )
        assert len(pieces) == 1, "beams are decided at the end"


def test_a_streamed_text_that_the_tokenizer_cleans_up_is_the_answer() -> None:
    made = shelf("t5")
    base = made.base()
    base.tokenizer.clean_up_tokenization_spaces = True
    base.tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    bias = tuple((token, 90.0) for token in base.tokenizer.convert_tokens_to_ids(["▁", "n", "'", "t", "."]))
    with made.engine(base) as engine:
        for strip in (True, False):
            asked = [SamplingParams(24, temperature=9.0, seed=seed, logit_bias=bias, strip=strip) for seed in range(4)]
            streamed = ["".join(engine.submit("generate", TEXTS[0], None, each).stream()) for each in asked]
            assert streamed == [engine.generate(TEXTS[:1], None, each)[0]["text"] for each in asked]
        base.tokenizer.clean_up_tokenization_spaces = False
        plain = [engine.generate(TEXTS[:1], None, each)[0]["text"] for each in asked]
    assert streamed != plain, "the control: there was something to clean up"


@pytest.mark.parametrize(
    "options", [SamplingParams(), SamplingParams(num_beams=2), SamplingParams(stop=("never there",))]
)
def test_a_listener_that_comes_after_the_answer_gets_the_whole_text(options: SamplingParams) -> None:
    with shelf("llama").engine() as engine:
        ticket = engine.submit("generate", TEXTS[0], "narrow", options)
        answer = ticket.result(30)
        assert answer["text"]
        assert list(ticket.stream()) == [answer["text"]]


def test_events_come_in_order_and_end_once() -> None:
    made = shelf("llama")
    with made.engine() as engine:
        events: list[Any] = []
        ticket = engine.submit("generate", TEXTS[0], "narrow")
        ticket.listen(events.append)
        ticket.result(30)
        late: list[Any] = []
        ticket.listen(late.append)
    assert all(isinstance(each, Piece) for each in events[:-1])
    assert isinstance(events[-1], Done)
    assert [type(each) for each in late] == [Piece, Done]
    assert "".join(each.text for each in events[:-1]) == late[0].text == ticket.result()["text"]


def test_a_stop_string_ends_the_text_before_it_and_frees_its_rows() -> None:
    made = shelf("llama", max_target_tokens=40)
    with made.engine() as engine:
        whole = engine.generate([TEXTS[0]], "narrow")[0]["text"]
        for size in (1, 3, 5):
            stop = whole[4 : 4 + size]
            ticket = engine.submit("generate", TEXTS[0], "narrow", SamplingParams(stop=(stop, "never there")))
            answer = ticket.result(30)
            assert answer["text"] == whole[: whole.index(stop)].strip()
            assert answer["finish_reason"] == "stop"
            streamed = engine.submit("generate", TEXTS[0], "narrow", SamplingParams(stop=(stop,)))
            assert "".join(streamed.stream()) == answer["text"]
        assert engine.stats().running == 0


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_does_not_end_before_its_fewest_tokens(beams: int) -> None:
    made = shelf("llama")
    eos = made.base().tokenizer.eos_token_id
    with made.engine() as engine:
        ends = SamplingParams(logit_bias=((eos, 100.0),), max_tokens=9, num_beams=beams)
        at_once, later = engine.generate([TEXTS[0]], "narrow", ends), SamplingParams(**vars(ends) | {"min_tokens": 5})
        assert [each["tokens"] for each in (*at_once, *engine.generate([TEXTS[0]], "narrow", later))] == [0, 5]
        whole = engine.generate([TEXTS[0]], "narrow", SamplingParams(max_tokens=9, num_beams=beams))[0]["text"]
        stopped = SamplingParams(max_tokens=9, num_beams=beams, stop=(whole[:3],))
        assert engine.generate([TEXTS[0]], "narrow", stopped)[0]["text"] == ""
        late = SamplingParams(**vars(stopped) | {"min_tokens": 8})
        assert engine.generate([TEXTS[0]], "narrow", late)[0]["text"].startswith(whole[:3])
    with pytest.raises(DataError, match="min_tokens = -1: expected a whole number from 0"):
        SamplingParams(min_tokens=-1)


def test_token_ids_are_used_unchanged() -> None:
    made = shelf("gpt2")
    with made.engine() as engine:
        ids = engine.base.tokenizer("a great film")["input_ids"]
        options = SamplingParams(max_tokens=8)
        answer = engine.submit("generate", ids, None, options).result(30)
        assert answer == engine.generate(["a great film"], None, options)[0]
        with pytest.raises(DataError, match="0 to 127"):
            engine.submit("generate", [1, 128], None)
        with pytest.raises(DataError, match="one or more"):
            engine.submit("generate", [], None)


def test_a_cancelled_generation_ends_and_frees_its_rows() -> None:
    made = shelf("llama")
    with made.engine(max_tokens=100_000, cache_tokens=200_000) as engine:
        ticket = engine.submit("generate", TEXTS[0], "narrow", SamplingParams(max_tokens=50_000))
        stream = ticket.stream()
        next(stream)
        ticket.cancel()
        with pytest.raises(Cancelled, match="was cancelled"):
            ticket.result(30)
        with pytest.raises(Cancelled):
            list(stream)
        assert isinstance(ticket._end, Failed)
        stats = engine.stats()
        assert (stats.running, stats.cache_tokens, stats.waiting) == (0, 0, 0)
        assert engine.loaded()[0].requests == 0
        assert engine.generate([TEXTS[0]], "narrow")[0]["tokens"] > 0


def test_a_request_larger_than_the_cache_is_refused_and_one_that_does_not_fit_now_waits() -> None:
    made = shelf("llama", max_target_tokens=30)
    with made.engine(cache_tokens=64) as engine:
        tickets = [engine.submit("generate", text, "narrow") for text in TEXTS]  # 64 tokens each
        answers = [ticket.result(30)["text"] for ticket in tickets]
        with pytest.raises(NoRoom, match=r"needs 128 tokens .* limit of cache_tokens is 64"):
            engine.submit("generate", TEXTS[0], "narrow", SamplingParams(max_tokens=90)).result(30)
    with made.engine() as engine:
        assert [each["text"] for each in engine.generate(TEXTS, "narrow")] == answers


def test_a_text_longer_than_the_bases_positions_is_refused() -> None:
    made = shelf("gpt2")
    with made.engine() as engine:
        with pytest.raises(DataError, match="max_tokens = 510: the prompt leaves room for"):
            engine.submit("generate", TEXTS[0], None, SamplingParams(max_tokens=510))
        with pytest.raises(DataError, match="has 600 tokens or more and this engine takes at most 512"):
            engine.submit("generate", [5] * 600, None)
        assert engine.generate([TEXTS[0]], None, SamplingParams(max_tokens=500))[0]["tokens"] <= 500


def test_a_text_that_would_change_the_frequencies_of_its_neighbours_is_refused() -> None:
    """Dynamic rotary positions are computed for the longest row of a pass."""
    made = shelf("llama")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    base = made.base(rope_parameters=rope, max_position_embeddings=64)
    with made.engine(base) as engine:
        with pytest.raises(DataError, match="has 65 tokens or more and this engine takes at most 64"):
            engine.submit("generate", [5] * 65, None)
        with pytest.raises(DataError, match="has 60 tokens or more and this engine takes at most 59"):
            engine.submit("generate", [5] * 60, "prefix").result(30)
        assert engine.submit("generate", [5] * 60, None, SamplingParams(min_tokens=4)).result(30)["tokens"] == 4


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("name", ["narrow", "prefix", None])
def test_logprobs_are_transformers_own_before_penalties_and_temperature(family: str, name: str | None) -> None:
    made, text = shelf(family), TEXTS[2]
    adapter = None if name is None else made.adapters[f"{name}@1"]
    model, base = alone(family, "generate", adapter), made.base()
    source = (
        torch.tensor(base.tokenizer(text)["input_ids"])
        if adapter is None
        else task_from_spec(adapter.task, base.tokenizer).encode_sources([text])[0].ids
    )
    for options in (
        SamplingParams(max_tokens=6, logprobs=3),
        SamplingParams(max_tokens=6, logprobs=0, temperature=2.0, seed=5),
        SamplingParams(max_tokens=6, logprobs=2, repetition_penalty=3.0),
    ):
        with made.engine() as engine:
            beside = engine.submit("generate", TEXTS[0], "wide", SamplingParams(max_tokens=9))
            answer = engine.submit("generate", text, name, options).result(30)
            assert "logprobs" not in beside.result(30)
        said = answer["logprobs"]
        assert len(said) == answer["tokens"] > 0
        ids = torch.tensor([each["id"] for each in said])
        with torch.inference_mode():
            logits = own_target_logits(model, [source], [ids])  # (T, V), at the chosen tokens
        expected = logits.float().log_softmax(-1)
        for row, each in zip(expected, said, strict=True):
            assert each["logprob"] == pytest.approx(float(row[each["id"]]), abs=1e-4)
            assert len(each["top"]) == options.logprobs
            most = row.topk(options.logprobs or 0)
            assert [other["logprob"] for other in each["top"]] == pytest.approx(most.values.tolist(), abs=1e-4)
            assert each["logprob"] <= max((other["logprob"] for other in each["top"]), default=0.0) + 1e-9
        assert "".join(each["token"] for each in said).strip() == answer["text"]


def test_logprobs_of_beams_and_too_many_logprobs_are_refused() -> None:
    with pytest.raises(DataError, match=r"logprobs = 21: expected a whole number from 0 to 20"):
        SamplingParams(logprobs=21)
    with shelf("llama", num_beams=3).engine() as engine:
        with pytest.raises(DataError, match=r"this answer has 3 beams: set num_beams = 1"):
            engine.submit("generate", TEXTS[0], "narrow", SamplingParams(logprobs=1)).result(30)
        answer = engine.submit(
            "generate", TEXTS[0], "narrow", SamplingParams(logprobs=1, num_beams=1, max_tokens=3)
        ).result(30)
        assert len(answer["logprobs"]) == answer["tokens"]
