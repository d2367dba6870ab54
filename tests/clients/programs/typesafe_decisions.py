"""TypeSafe's client: system_one, sync and async, with text and JSON as the state."""

import asyncio
import json
import os

from typesafe_sdk import AsyncTypeSafeClient, Choice, Noul, RetryPolicy, Score, TypeSafeClient, TypeSafeError

AT = {
    "base_url": os.environ["URL"].removesuffix("/v1"),
    "api_key": os.environ["TOKEN"],
    "model": "tickets",
    "retry": RetryPolicy(max_retries=0),
}
QUESTIONS = {
    "stars": Score(instructions="How good?", criteria=["1", "2", "3"]),
    "urgent": Noul(instructions="Is it urgent?"),
    "topic": Choice(instructions="Which?", criteria={"bank": "money", "film": None}),
    "sure": Choice(instructions="Which?", criteria={"bank": None, "film": None}),
}


def plain(response):
    return {name: each.model_dump() for name, each in response.answers.items()}


told = {}
with TypeSafeClient(**AT) as client:
    first = client.system_one(state="the market fell", questions=QUESTIONS)
    told["sync"], told["model"], told["tokens"] = plain(first), first.model, first.usage.input_tokens
    told["raw"] = first.raw_http_response.json()
    told["json"] = plain(client.system_one(state={"document": "the market fell"}, questions=QUESTIONS))
    try:
        client.system_one(state="x", questions={"topic": Choice(criteria={"x": None})})
    except TypeSafeError as error:
        told["bad_request"] = [type(error).__name__, str(error)]


async def ask():
    async with AsyncTypeSafeClient(**AT) as other:
        return plain(await other.system_one(state="the market fell", questions=QUESTIONS))


told["async"] = asyncio.run(ask())
print(json.dumps(told))
