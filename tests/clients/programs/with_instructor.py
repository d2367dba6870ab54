"""instructor: an answer as an object, in each of its modes that the server can carry out."""

import json
import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Review(BaseModel):
    good: bool
    tone: Literal["calm", "loud"]


client = openai.OpenAI(base_url=os.environ["URL"], api_key=os.environ["TOKEN"], max_retries=0)
told = {}
for name in os.environ["MODES"].split():
    asked = instructor.from_openai(client, mode=getattr(instructor.Mode, name))
    said = [{"role": "user", "content": "a great film"}]
    got = asked.chat.completions.create(
        model=os.environ["MODEL"],
        messages=said,
        response_model=Review,
        max_retries=0,
        max_tokens=1000,
        temperature=1.0,
        seed=1,
    )
    told[name] = got.model_dump()
print(json.dumps(told))
