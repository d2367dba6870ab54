"""OpenAI's Python client: decisions, sync, async and raw, with text and messages."""

import asyncio
import json
import os

import openai

URL, TOKEN = os.environ["URL"], os.environ["TOKEN"]
TEXT = "the market fell"
QUESTIONS = [
    {"type": "score", "name": "stars", "instructions": "How good?", "levels": [{"label": each} for each in "123"]},
    {"type": "predicate", "name": "urgent", "instructions": "Is it urgent?"},
    {
        "type": "choice",
        "name": "urgent",
        "instructions": "Is it urgent?",
        "choices": [{"value": True, "description": "now"}, {"value": False}],
    },
    {"type": "choice", "name": "topic", "instructions": "Which?", "choices": [{"value": "bank"}, {"value": "film"}]},
    {"type": "choice", "name": "sure", "instructions": "Which?", "choices": [{"value": "bank"}, {"value": "film"}]},
]  # fmt: skip
MESSAGES = [
    {"role": "user", "content": [{"type": "input_text", "text": "the market"}, {"type": "input_text", "text": " fell"}]}
]
client = openai.OpenAI(base_url=URL, api_key=TOKEN, max_retries=0)


def plain(decision):
    return [each.to_dict(exclude_unset=False) for each in decision.answers]


told = {}
decision = client.decisions.create(model="tickets", input=TEXT, questions=QUESTIONS)
told["types"] = [type(each).__name__ for each in decision.answers]
told["sync"], told["model"], told["usage"] = plain(decision), decision.model, decision.usage.to_dict()
told["typed"] = [type(decision.answers[2].choice).__name__, type(decision.answers[3].choice).__name__]
told["messages"] = plain(client.decisions.create(model="tickets", input=MESSAGES, questions=QUESTIONS))
raw = client.decisions.with_raw_response.create(
    model="tickets", input=TEXT, questions=QUESTIONS, prompt_cache_key="k", safety_identifier="s"
)
told["raw"], told["panel"] = plain(raw.parse()), raw.headers["turret-panel"]


async def at_once():
    async with openai.AsyncOpenAI(base_url=URL, api_key=TOKEN, max_retries=0) as other:
        ask = lambda: other.decisions.create(model="tickets", input=TEXT, questions=QUESTIONS)
        return [plain(each) for each in await asyncio.gather(*(ask() for _ in range(4)))]


told["async"] = asyncio.run(at_once())
for key, changes in {
    "not_found": {"model": "missing"},
    "bad_request": {"questions": [{**QUESTIONS[3], "choices": [{"value": "x"}, {"value": "y"}]}]},
}.items():
    try:
        client.decisions.create(**{"model": "tickets", "input": TEXT, "questions": QUESTIONS, **changes})
    except openai.APIStatusError as error:
        told[key] = [type(error).__name__, error.message]
print(json.dumps(told))
