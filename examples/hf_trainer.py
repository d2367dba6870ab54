"""Train a prefix with the Trainer of transformers, then let PEFT load the result.

python examples/hf_trainer.py
"""

from __future__ import annotations

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import turret


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    # A small decoder with random weights, so that nothing is downloaded. Use from_pretrained(...) with a real base.
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained("tiny-llama")

    ids = list(range(10, 26))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for _ in range(64)]

    turret.attach(model, turret.Prefix(num_virtual_tokens=8))
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    print(f"{trained:,} trained parameters")  # the prefix and the MLP that makes it; the base is frozen
    arguments = TrainingArguments(
        "trainer-output", max_steps=steps, learning_rate=1e-2, logging_steps=5, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    prompt = torch.tensor([ids[:4]])
    with torch.no_grad():
        wanted = model(input_ids=prompt).logits  # (1, T, V)
    turret.save(model, "trainer-prefix", base="tiny-llama")
    turret.detach(model)

    loaded = peft.PeftModel.from_pretrained(model, "trainer-prefix").eval()
    with torch.no_grad():
        given = loaded(input_ids=prompt).logits[:, -prompt.shape[1] :]
    print(f"largest difference between Turret and PEFT: {(given - wanted).abs().max().item():.1e}")
    assert torch.allclose(given, wanted, atol=1e-4)


if __name__ == "__main__":
    main()
