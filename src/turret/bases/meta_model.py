"""A base without weights: its modules on torch's meta device, from its configuration alone.

It tells how much memory a base needs before a byte of its weights is read.
"""

from __future__ import annotations

import math

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from turret.bases.source import BaseSource, quiet_transformers
from turret.families import Family, family_of
from turret.families.family import HeadKind, take_head_off
from turret.transformer import Model, ModelConfig

AutoClass = type[
    AutoModelForSequenceClassification | AutoModelForTokenClassification | AutoModelForSeq2SeqLM | AutoModelForCausalLM
]
CONTEXT = 600_000_000  # bytes of a GPU that CUDA's context, its libraries and their workspaces take
PACKED = 0.9  # bytes a weight with linear layers in 4 bits: embeddings and the output layer are not packed
ANSWERING = 1.2  # times the weights: they, a pass of prompts and the keys and values of some rows


def skeleton(source: BaseSource, task: HeadKind, num_labels: int | None = None) -> Model:
    """The model of a base on the meta device, in eval mode.

    Raises:
        UnknownFamily: the architecture is not listed.
    """
    labels = {"num_labels": num_labels} if task != "generate" and num_labels is not None else {}
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True, **labels)
    for name, value in family_of(config).loaded_with.items():
        setattr(config, name, value)
    return model_of(config, task)


def model_of(config: ModelConfig, task: HeadKind) -> Model:
    """The model of a configuration on the meta device. Raises UnknownFamily if its architecture is not listed."""
    family = family_of(config)
    auto = auto_class(family, task)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: Model = auto.from_config(config)
    if family.head_for(task) == "embed":
        take_head_off(model, family)
    model.requires_grad_(False).eval()
    return model


def auto_class(family: Family, task: HeadKind) -> AutoClass:
    """The class of transformers that makes the models of a family for a task."""
    auto: AutoClass = AutoModelForCausalLM
    task = family.head_for(task)
    if task == "classify" or task == "embed":
        auto = AutoModelForSequenceClassification
    elif task == "tag":
        auto = AutoModelForTokenClassification
    elif family.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    return auto


def parameters_of(source: BaseSource) -> int:
    """The number of weights in a base's files, from their headers."""
    count = 0
    for path in source.weights:
        with safe_open(path, framework="numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def room_to_answer(source: BaseSource, dtype: torch.dtype, *, packed: bool = False) -> int:
    """Bytes that should be free on a GPU before a base is loaded there to answer.

    packed: the linear layers are kept in 4 bits. For a base that is packed already this is too much, never too little.
    """
    each = PACKED if packed else dtype.itemsize
    return round(ANSWERING * parameters_of(source) * each) + CONTEXT
