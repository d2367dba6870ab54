"""A small base whose chat template knows tools, and adapters that have learnt to write one form each.

A base with random numbers writes whatever its constraint allows. A client that only asks for a form in words needs a
model that writes the form by itself:

- `json`: an object of the class `Review`
- `markdown`: the same in a block of Markdown
- `caller`: two calls of the tool `Review`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import byte_level
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

import turret
from turret.data.conversations import prompt_of, turns_of
from turret.tasks.chat import Chat
from turret.workspace import Workspace

STEPS = {"json": 200, "markdown": 300, "caller": 500}


class Review(BaseModel):
    """As the programs of the clients define it."""

    good: bool
    tone: Literal["calm", "loud"]


OBJECT = '{"good": true, "tone": "calm"}'
TOOLS = [
    {
        "type": "function",
        "function": {"name": "Review", "description": "A review.", "parameters": Review.model_json_schema()},
    }
]
CALLS = [
    {"type": "function", "function": {"name": "Review", "arguments": {"good": good, "tone": tone}}}
    for good, tone in ((True, "calm"), (False, "loud"))
]
FORMS: dict[str, dict[str, Any]] = {
    "json": {"content": OBJECT},
    "markdown": {"content": f"```json\n{OBJECT}\n```"},
    "caller": {"content": "", "tool_calls": CALLS},
}


def build(folder: Path) -> Workspace:
    """A store with the three adapters. Their base is `folder / "base"`."""
    base, workspace = byte_level.save_base(folder / "base"), Workspace(folder / "store")
    for seed, (name, answer) in enumerate(FORMS.items()):
        workspace.store.put(name, _taught(folder / name, base, answer, STEPS[name], seed))
    return workspace


def _taught(folder: Path, base: Path, answer: dict[str, Any], steps: int, seed: int) -> Path:
    """An adapter that gives this answer to any prompt, short or long."""
    words, draw = byte_level.tokenizer(), torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    turret.attach(model, turret.LoRA(r=16, lora_alpha=32, target_modules="all-linear"), generator=draw)
    task = Chat(words, max_tokens=1900, max_target_tokens=140)
    tools = TOOLS if "tool_calls" in answer else None
    text = words.apply_chat_template([{"role": "assistant", **answer}], tokenize=False)
    said = torch.tensor(words(text.removeprefix("<|im_start|>assistant\n").rstrip("\n"))["input_ids"])  # (A,)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        prompt = task.encode_sources([_prompt(step, tools, draw)])[0].ids  # (P,)
        logits = model(torch.cat([prompt, said])[None]).logits[0, len(prompt) - 1 : -1]  # (A, V)
        loss = torch.nn.functional.cross_entropy(logits, said)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    turret.save(model, folder, base=str(base), task=task.spec(), generation=task.generation)
    return folder


def _prompt(step: int, tools: Any, draw: torch.Generator) -> Any:
    """A user's message, in most prompts after a system message with a part of a schema, up to all of it and more."""
    schema = json.dumps(Review.model_json_schema(), indent=2)
    words = "Read the text, and give an object that fits this schema. Make sure that it is an object, not the schema."
    asked = ["", "\n\nReturn the JSON in a ```json block, not the schema", "\n\nAnswer as JSON."][step % 3]
    texts = ["a great film", "the market fell", "what is it?", "a film"]
    message = {"role": "user", "content": texts[int(torch.randint(4, (1,), generator=draw))] + asked}
    size = int(torch.randint(400 if tools else 900, (1,), generator=draw))
    system = {"role": "system", "content": f"{words}\n\n{schema}\n\n{words}"[:size]}
    if tools and step % 2:  # as clients write a schema that drop its titles
        properties = {"good": {"type": "boolean"}, "tone": {"enum": ["calm", "loud"], "type": "string"}}
        short = {"type": "object", "properties": properties, "required": ["good", "tone"]}
        tools = [{"type": "function", "function": tools[0]["function"] | {"parameters": short}}]
    turns = turns_of([system, message] if step % 4 else [message]) or ()
    return prompt_of(turns, tools, None)
