"""A small decoder with a byte-level tokenizer and a chat template that knows tools, as real instruct models have them.

save_base(tmp_path / "base")                           a folder as a user has it
save_adapter(tmp_path / "bundle", base, seed=1)        an adapter of it with random numbers, whose task is `generate`
save_classifier(tmp_path / "bundle", base, seed=1)     one whose task is `classify`
store_to_compose(workspace, tmp_path, base)            adapters that can be composed, and one that cannot
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import small_models
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import turret
from turret.methods import Method
from turret.tasks.classify import Classify
from turret.tasks.generate import Generate

VOCABULARY = 400
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog, and the film was a great pleasure to watch.",
    '{"name": "Ada", "age": 36, "tags": ["first", "true"], "place": {"city": "London", "code": null}}',
    "Le café de l'été coûte 3 €, naïve Übergröße. 東京 is 🗼 and 🙂.",
)


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """BPE over bytes: any text has tokens, and a character may have several."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=512, pad_token=SPECIALS[0], eos_token=SPECIALS[2]
    )
    made.chat_template = CHAT
    return made


def save_base(folder: Path, seed: int = 0, **changes: int) -> Path:
    """A base as a user has it on disk."""
    words = tokenizer()
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    model = small_models.build(
        "qwen3", "generate", seed=seed, vocab_size=VOCABULARY, max_position_embeddings=2048, **ids, **changes
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int, method: Method | None = None, **settings: int) -> Path:
    """An adapter of the base with random numbers in every tensor."""
    model = _with_adapter(AutoModelForCausalLM.from_pretrained(base), seed, method)
    task = Generate(tokenizer(), "decoder", **({"max_tokens": 32, "max_target_tokens": 24} | settings))
    turret.save(model, folder, base=str(base), task=task.spec(), generation=task.generation)
    return folder


def save_classifier(folder: Path, base: Path, seed: int, method: Method | None = None) -> Path:
    """As `save_adapter`, with the labels bad and good."""
    model = _with_adapter(AutoModelForSequenceClassification.from_pretrained(base), seed, method)
    turret.save(model, folder, base=str(base), task=Classify(("bad", "good"), tokenizer(), max_tokens=32).spec())
    return folder


def store_to_compose(workspace: turret.Workspace, folder: Path, base: Path) -> None:
    """Store x, y and z (LoRA), p and q (prefixes) and i (IA3), with x@1 in production."""
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    methods = {
        "x": turret.LoRA(**lora, target_modules=("q_proj", "v_proj")),
        "y": turret.LoRA(**lora | {"r": 2}, target_modules="all-linear"),
        "z": turret.LoRA(**lora, target_modules=("o_proj",)),
        "p": turret.Prefix(num_virtual_tokens=3, reparametrize=False),
        "q": turret.Prefix(num_virtual_tokens=2, reparametrize=False),
        "i": turret.Peft(peft_type="IA3"),
    }
    for seed, (name, method) in enumerate(methods.items(), 1):
        workspace.store.put(name, save_adapter(folder / name, base, seed, method))
    workspace.promote("x@1", "production")


def _with_adapter(model: PreTrainedModel, seed: int, method: Method | None) -> PreTrainedModel:
    draw = torch.Generator().manual_seed(seed)
    turret.attach(model, method or turret.LoRA(r=4, lora_alpha=8, init_lora_weights=False), generator=draw)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=draw) * 0.2)
    return model
