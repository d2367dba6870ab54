"""instructor: an answer as an object, in every mode of its OpenAI client. MODES: {mode: model} as JSON."""

import json
import os
from collections.abc import Iterable
from typing import Literal

import instructor
import openai
from instructor.v2.core.providers import Provider
from instructor.v2.core.registry import mode_registry
from pydantic import BaseModel


class Review(BaseModel):
    good: bool
    tone: Literal["calm", "loud"]


client = openai.OpenAI(base_url=os.environ["URL"], api_key=os.environ["TOKEN"], max_retries=0)
told = {}
for name, model in json.loads(os.environ["MODES"]).items():
    several = name == "PARALLEL_TOOLS"
    asked = instructor.from_openai(client, mode=getattr(instructor.Mode, name))
    more = {} if name.startswith("RESPONSES") else {"seed": 1}  # OpenAI's responses have no seed
    try:
        got = asked.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "a great film"}],
            response_model=Iterable[Review] if several else Review,
            max_retries=0,
            max_tokens=300,
            temperature=1.0 if model == "base" else 0.0,
            **more,
        )
        told[name] = [each.model_dump() for each in got] if several else got.model_dump()
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"[:500]
offered = sorted(mode.name for mode in mode_registry.get_modes_for_provider(Provider.OPENAI))
print(json.dumps({"told": told, "offered": offered}))
