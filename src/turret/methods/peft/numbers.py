"""The tensors of a method that PEFT itself computes: PEFT puts its modules on the model, names them and fills them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from turret.adapters import through_peft
from turret.adapters.adapter import LORA_PREFIX, PROMPT, Adapter, Extracted, Parts, copied, head_tensors, mount_head
from turret.adapters.attached import Attachment, Beginning, device_of
from turret.adapters.batch_context import BARE, set_context
from turret.adapters.peft_config import check_agreement, refuse_code
from turret.adapters.prefix import Groups
from turret.errors import AdapterError
from turret.families import family_of
from turret.methods.numbers import MethodNumbers, fill_parameters, head_parameters
from turret.methods.peft.spec import Peft


class PeftNumbers(MethodNumbers[Peft]):
    """PEFT's modules in slot 1, alone on the model."""

    def require_known(self) -> None:
        """Raises RecipeError for a method or a setting that PEFT does not know."""
        through_peft.config_of(self.method)

    def start(self, model: Any, attached: Attachment, beginning: Beginning) -> None:
        _invite(model, attached, self.method, beginning.generator)
        super().start(model, attached, beginning)

    def extract(self, attached: Attachment, slot: int) -> Extracted:
        guest = _guest(attached)
        tensors = {name: copied(value) for name, value in through_peft.tensors_of(guest).items()}
        return Extracted(tensors, head_tensors(attached, slot), through_peft.finished(guest.method))

    def fill(self, model: Any, attached: Attachment, adapter: Adapter, generator: torch.Generator | None) -> None:
        guest = _guest(attached)
        if adapter.method != through_peft.finished(guest.method):
            raise AdapterError("it has other settings of PEFT than the method here: set [method] as it has it")
        through_peft.fill(guest, adapter.tensors)
        fill_parameters(head_parameters(attached), adapter.head)

    def owns(self, name: str) -> bool:
        """By the mark that PEFT gives the names of its tensors."""
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        made = through_peft.config_of(self.method)
        mark = PEFT_TYPE_TO_PREFIX_MAPPING.get(made.peft_type)
        if made.is_prompt_learning:
            return name == PROMPT["decoder"]
        shared = not name.startswith(LORA_PREFIX)  # what all layers read, such as VeRA's matrices
        return shared or bool(mark and mark in name)

    def peft_words(self) -> dict[str, Any]:
        made = through_peft.config_of(self.method)
        return through_peft.kept(made) | {"peft_type": made.peft_type.value}

    def peft_config(self, adapter: Adapter) -> dict[str, Any]:
        return self.peft_words() | ({"modules_to_save": adapter.head_modules} if adapter.head else {})

    def check_config(self, config: dict[str, Any]) -> None:
        refuse_code(config)
        check_agreement(config, self.peft_words())

    def merged(self, model: Any, adapter: Adapter) -> dict[str, Tensor]:
        """The weights that PEFT's own merging changes, on a copy."""
        twin = copy.deepcopy(model)
        guest = through_peft.invite(twin, family_of(twin.config), self.method)
        through_peft.fill(guest, adapter.tensors)
        before = model.state_dict()
        whole = through_peft.merged(guest)
        if odd := sorted(set(whole) ^ set(before)):
            raise AdapterError(
                f"PEFT does not merge {self.method.peft_type} whole ({odd[0]}): export it without --merged"
            )
        return {name: each for name, each in whole.items() if not torch.equal(each, before[name])}

    def parts(self, model: Any, adapter: Adapter) -> Parts:
        raise AdapterError(
            f"{self.method.peft_type} is computed by PEFT, one adapter at a time, and cannot share a base with others: "
            "export it merged and serve it as a base of its own, where PEFT merges it"
        )

    def mount(self, model: Any, attached: Attachment, adapter: Adapter, slot: int) -> None:
        if attached.methods or slot != 1:
            raise AdapterError("an adapter of PEFT answers alone: mount it in slot 1 of a model without adapters")
        _invite(model, attached, through_peft.finished(self.method))
        guest = _guest(attached)
        through_peft.fill(guest, adapter.tensors)
        for each in guest.parameters.values():
            each.requires_grad_(False)
        for part in (*guest.layers, *attached.prefixes.values()):
            part.eval()
        mount_head(model, attached, adapter.head, slot)


def _guest(attached: Attachment) -> through_peft.Guest:
    assert attached.guest is not None
    return attached.guest


def _invite(model: Any, attached: Attachment, method: Peft, generator: torch.Generator | None = None) -> None:
    """Have PEFT put its method on a hooked model, in slot 1; it leaves with everything else."""
    guest = through_peft.invite(model, attached.family, method, generator)
    attached.guest = guest
    attached.undo.append(guest.leave)
    if not guest.layers:
        prompt = through_peft.Prompt(guest, functools.partial(_read, model, attached))
        attached.prefixes["1"] = prompt.to(device_of(model))


def _read(model: Any, attached: Attachment, tokens: Tensor) -> Groups:
    """Keys and values that the bare base gives to virtual tokens alone, by group. tokens: (1, P, D)."""
    captured: dict[str, tuple[Tensor, Tensor]] = {}
    context = attached.context
    before = context.active, context.capture
    context.active, context.capture = BARE, captured
    try:
        with set_context(context, None, None):
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            dtype = model.get_input_embeddings().weight.dtype
            model.base_model(inputs_embeds=tokens.to(dtype), attention_mask=mask, use_cache=False)
    finally:
        context.active, context.capture = before
    groups: Groups = {}
    for site in attached.sites:
        key, value = captured[site.name]
        groups.setdefault(site.group, []).append((key[0], value[0]))
    return groups
