"""langchain-openai: OpenAIDecisions, sync and async, with text, messages and a conversation."""

import asyncio
import json
import os

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai.decisions import Choice, OpenAIDecisions, Predicate, Score

decisions = OpenAIDecisions(model="tickets", base_url=os.environ["URL"], api_key=os.environ["TOKEN"], max_retries=0)
questions = {
    "stars": Score(instructions="How good?", levels=["1", "2", "3"]),
    "urgent": Predicate(instructions="Is it urgent?"),
    "topic": Choice(instructions="Which?", choices={"bank": "money", "film": None}),
    "sure": Choice(instructions="Which?", choices={"bank": None, "film": None}),
}


def plain(answered):
    return {name: each.model_dump() for name, each in answered.answers.items()}


def ask(state):
    return {"input": state, "questions": questions}


first = decisions.invoke(ask("the market fell"))
told = {"sync": plain(first), "model": first.model, "tokens": first.usage.input_tokens}
told["refusals"] = list(first.refusals)
told["message"] = plain(decisions.invoke(ask(HumanMessage("the market fell"))))
told["async"] = plain(asyncio.run(decisions.ainvoke(ask("the market fell"))))
told["batch"] = [plain(each) for each in decisions.batch([ask("the market fell")] * 2)]
told["conversation"] = list(decisions.invoke(ask([HumanMessage("the market fell"), AIMessage("oh")])).answers)
print(json.dumps(told))
