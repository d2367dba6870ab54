"""Two-layer models of every family, built from their configurations, and a small real tokenizer for each.

    build("llama", "classify", num_labels=3, seed=0)    a PreTrainedModel with random weights, in eval mode
    build("t5", "generate")
    tokenizer("gpt2")                                   a fast tokenizer: BPE over ASCII, trained in memory
    save_base("bert", tmp_path / "bert")                a folder as a user has it: config, safetensors, tokenizer

The weights are larger than a fresh model's, so that every part matters to the output; a parameter's values depend
on its name and the seed only, so that `classify` and `generate` of one seed have the same body.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

Task = Literal["classify", "generate", "body"]

ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
ENCODER_DECODERS = ("t5", "bart")
DECODERS = ("llama", "gpt2", "qwen3")
FAMILIES = ENCODERS + ENCODER_DECODERS + DECODERS
GENERATORS = ENCODER_DECODERS + DECODERS  # the families that have a language model variant

# Those that are made much like one of the families above: `tests/families` takes them through one matrix of tests.
RELATIVE_ENCODERS = ("xlm-roberta", "camembert", "electra", "albert", "mpnet", "deberta-v2", "big_bird")
RELATIVE_ENCODER_DECODERS = ("mt5", "mbart", "pegasus")
RELATIVE_DECODERS = ("mistral", "qwen2", "gemma2", "gemma3_text", "phi3")
RELATIVES = RELATIVE_ENCODERS + RELATIVE_ENCODER_DECODERS + RELATIVE_DECODERS

VOCABULARY = 128
LAYERS = 2

# The order is the order of the ids.
_SPECIALS: dict[str, dict[str, str]] = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
    "t5": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    "llama": {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
    "gpt2": {"eos": "<|endoftext|>"},  # as the real one: no pad token
    "qwen3": {"pad": "<|endoftext|>", "eos": "<|im_end|>", "start": "<|im_start|>"},
}
_LIKE = {"distilbert": "bert", "modernbert": "bert", "bart": "roberta"}  # families with the special tokens of another
_LIKE |= dict.fromkeys(("electra", "albert", "deberta-v2", "big_bird"), "bert")
_LIKE |= dict.fromkeys(("xlm-roberta", "camembert", "mpnet", "mbart"), "roberta")
_LIKE |= dict.fromkeys(("mt5", "pegasus"), "t5") | dict.fromkeys(RELATIVE_DECODERS, "llama")
_SPECIALS |= {family: _SPECIALS[like] for family, like in _LIKE.items()}

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
_CORPUS = (
    "the quick brown fox jumps over the lazy dog, and the film was a great pleasure to watch.",
    "a dull and boring story about the market; shares of the bank fell by 12% in london.",
    "summarize: translate the text, then write what it is about in one line! why not?",
)


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of VOCABULARY entries that knows every printable ASCII character (in lower case)."""
    specials = _SPECIALS[family]
    core = Tokenizer(models.BPE(unk_token=specials.get("unk")))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(specials.values()),
        initial_alphabet=["▁", *characters],
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    _add_template(core, family)
    names = {f"{role}_token": token for role, token in specials.items() if role != "start"}
    if "bos" in specials and "mask" in specials:
        names |= {"cls_token": specials["bos"], "sep_token": specials["eos"]}
    if _LIKE.get(family, family) == "bert":
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **names)
    if family == "qwen3":
        wrapped.chat_template = _CHAT
    return wrapped


def _add_template(core: Tokenizer, family: str) -> None:
    around = {
        "bert": ("[CLS]", "[SEP]"),
        "roberta": ("<s>", "</s>"),
        "t5": (None, "</s>"),
        "llama": ("<s>", None),
    }
    family = _LIKE.get(family, family)
    if family not in around:
        return
    first, last = around[family]
    single = " ".join(part for part in (first, "$A", last) if part)
    segment = ":1" if family == "bert" else ""
    pair = " ".join(part for part in (first, "$A", last, f"$B{segment}", last and f"{last}{segment}") if part)
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(t, core.token_to_id(t)) for t in (first, last) if t]
    )


def config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """The configuration of a small model; heads of 16, grouped queries where the family has them."""
    ids = {f"{role}_token_id": index for index, role in enumerate(_SPECIALS[family]) if role in ("pad", "bos", "eos")}
    ids.setdefault("pad_token_id", ids.get("eos_token_id", 0))
    encoder = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 520,
        **ids,
    }
    decoder = encoder | {"hidden_size": 48, "head_dim": 16, "num_key_value_heads": 2}
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "bert": ("BertConfig", encoder),
        "roberta": ("RobertaConfig", encoder),
        "distilbert": (
            "DistilBertConfig",
            {"dim": 64, "hidden_dim": 96, "n_layers": LAYERS, "n_heads": 4, "vocab_size": VOCABULARY, **ids},
        ),
        "modernbert": (
            "ModernBertConfig",
            encoder
            | {"local_attention": 16, "cls_token_id": 2, "sep_token_id": 3}
            | {"bos_token_id": 2, "eos_token_id": 3},
        ),
        "t5": (
            "T5Config",
            {"d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": LAYERS, "num_heads": 4, "vocab_size": VOCABULARY}
            | {"decoder_start_token_id": ids["pad_token_id"], **ids},
        ),
        "bart": (
            "BartConfig",
            {"d_model": 64, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "vocab_size": VOCABULARY}
            | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96}
            | {"decoder_ffn_dim": 96, "max_position_embeddings": 512, "decoder_start_token_id": 2}
            | {"forced_eos_token_id": None, **ids},
        ),
        "llama": ("LlamaConfig", decoder),
        "gpt2": (
            "GPT2Config",
            {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_inner": 96, "n_positions": 512}
            | {"vocab_size": VOCABULARY, "bos_token_id": ids.get("eos_token_id"), **ids},
        ),
        "qwen3": ("Qwen3Config", decoder),
        "mistral": ("MistralConfig", decoder | {"sliding_window": 6}),  # narrower than the rows of the tests
        "qwen2": ("Qwen2Config", decoder),
        "gemma2": (
            "Gemma2Config",
            decoder
            | {"sliding_window": 6, "query_pre_attn_scalar": 12}
            | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        ),
        "gemma3_text": (
            "Gemma3TextConfig",
            decoder
            | {"sliding_window": 6, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0}
            | {"layer_types": ["sliding_attention", "full_attention"]},
        ),
        "phi3": ("Phi3Config", decoder | {"sliding_window": 6}),
        "electra": ("ElectraConfig", encoder | {"embedding_size": 32}),
        "albert": (
            "AlbertConfig",
            encoder | {"embedding_size": 32, "num_hidden_layers": 3, "num_hidden_groups": 1, "inner_group_num": 1},
        ),
        "deberta-v2": (
            "DebertaV2Config",
            encoder
            | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
            | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
            | {"type_vocab_size": 0, "pooler_hidden_size": 64},
        ),
        "big_bird": ("BigBirdConfig", encoder | {"attention_type": "original_full", "bos_token_id": 2}),
        "mbart": (
            "MBartConfig",
            {"d_model": 64, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "vocab_size": VOCABULARY}
            | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96}
            | {"decoder_ffn_dim": 96, "max_position_embeddings": 512, "decoder_start_token_id": 2}
            | {"forced_eos_token_id": None, "scale_embedding": True, **ids},
        ),
        "pegasus": (
            "PegasusConfig",
            {"d_model": 64, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "vocab_size": VOCABULARY}
            | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96}
            | {"decoder_ffn_dim": 96, "max_position_embeddings": 512, "decoder_start_token_id": 0}
            | {"forced_eos_token_id": None, "scale_embedding": True, **ids},
        ),
    }
    settings |= {
        "xlm-roberta": ("XLMRobertaConfig", encoder),
        "camembert": ("CamembertConfig", encoder),
        "mpnet": ("MPNetConfig", encoder),
        "mt5": ("MT5Config", settings["t5"][1]),
    }
    name, values = settings[family]
    return getattr(transformers, name)(**(values | changes))


_STEMS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "modernbert": "ModernBert",
    "t5": "T5",
    "bart": "Bart",
    "llama": "Llama",
    "gpt2": "GPT2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi3": "Phi3",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "albert": "Albert",
    "mpnet": "MPNet",
    "deberta-v2": "DebertaV2",
    "big_bird": "BigBird",
    "mt5": "MT5",
    "mbart": "MBart",
    "pegasus": "Pegasus",
}


def _class_of(family: str, task: Task) -> type[PreTrainedModel]:
    if task == "classify":
        suffix = "ForSequenceClassification"
    elif task == "body":
        suffix = "Model"
    elif family in ENCODER_DECODERS + RELATIVE_ENCODER_DECODERS:
        suffix = "ForConditionalGeneration"
    elif family == "gpt2":
        suffix = "LMHeadModel"
    elif family in DECODERS + RELATIVE_DECODERS:
        return getattr(transformers, _STEMS[family].removesuffix("Text") + "ForCausalLM")
    else:
        raise ValueError(f"{family} cannot generate")
    return getattr(transformers, _STEMS[family] + suffix)


def build(family: str, task: Task, num_labels: int = 3, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small random model in eval mode; the global random generator is left as it was."""
    if task == "classify":
        changes = {"num_labels": num_labels, **changes}
    with no_init_weights():  # all are filled below: to draw them first takes most of the time
        model = _class_of(family, task)(config(family, **changes))
    model.tie_weights()
    prefix = model.base_model_prefix + "."
    for name, parameter in model.named_parameters():
        _fill(name.removeprefix(prefix), parameter, seed)
    return model.eval()


@torch.no_grad()
def _fill(name: str, parameter: torch.nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim > 1:
        parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    elif name.endswith("bias"):
        parameter.copy_(noise * 0.1)
    else:  # the weight of a norm
        parameter.copy_(1 + noise * 0.1)


def save_base(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A base as a user has it on disk: encoders as bare bodies, the others with their language model head."""
    model = build(family, "body" if family in ENCODERS + RELATIVE_ENCODERS else "generate", seed=seed, **changes)
    if family == "gpt2":
        model.config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return Path(folder)
