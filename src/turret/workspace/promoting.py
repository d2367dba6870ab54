"""The promote verb: golden examples are put to the version, then the store judges and moves the alias.

The store refuses, in the transaction that moves the alias, what was not replayed with the very content that is
promoted; then this replays and asks again. So examples that were added meanwhile are replayed too. Loads torch only to
replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from turret.errors import ReplayNeeded
from turret.store import Move, Store, Version
from turret.store.catalog import now
from turret.store.golden import Example, Golden, GoldenReplay, GoldenSet, misfit, name_of
from turret.store.promotion import Also

if TYPE_CHECKING:
    from turret.workspace.answering import Mounted

Stage = Callable[[str], None] | None
Ask = Callable[[str, Sequence[str]], Sequence[dict[str, Any]]]  # (version, texts) -> answers, as predict gives them
SHOWN = 500  # characters of an answer that are kept with a failure


def promote(
    store: Store,
    reference: str,
    alias: str,
    require: Sequence[str],
    *,
    again: bool = False,
    stage: Stage = None,
    ask: Ask | None = None,
    also: Also = None,
) -> Move:
    """Move the alias; `again` replays what was replayed before too; `ask` answers in place of a base loaded for it.

    also: written in the transaction that moves it.
    """
    version = store.resolve(reference)  # from here on by number, which never means anything else
    asker = _Asker(store, version, stage, ask)
    if again:
        kept = [gate.golden for gate in store.gate(version.name, alias) if isinstance(gate, Golden)]
        asker.ask(kept, only_fitting=True)
    while True:
        try:
            return store.promote(str(version), alias, require=require, also=also)
        except ReplayNeeded as needed:
            asker.ask(needed.sets)


class _Asker:
    """One version, asked by whoever has its base in memory, or put on its base when it is asked first."""

    def __init__(self, store: Store, version: Version, stage: Stage, ask: Ask | None) -> None:
        self._store, self._version, self._stage = store, version, stage
        self._answers = ask or self._mounted
        self._ready: Mounted | None = None

    def ask(self, sets: Sequence[str], *, only_fitting: bool = False) -> None:
        """Replay these sets and keep how each went; `only_fitting` leaves what cannot be asked to the store."""
        for digest in sets:
            wanted = self._store.examples(digest)
            if only_fitting and misfit(self._version, wanted):
                continue
            if self._stage is not None:
                self._stage(f"asking {len(wanted.examples)} golden examples ({name_of(digest)})")
            given = self._answers(str(self._version), [example.text for example in wanted.examples])
            self._store.keep_replay(self._version, judged(digest, wanted, given))

    def _mounted(self, version: str, texts: Sequence[str]) -> Sequence[dict[str, Any]]:
        from turret.workspace import answering

        if self._ready is None:
            self._ready = answering.mounted(self._store, version, self._stage)
        return answering.answers(self._ready, texts)


def judged(digest: str, wanted: GoldenSet, given: Sequence[dict[str, Any]]) -> GoldenReplay:
    """How many passed, and the first that did not."""
    first, passed = None, 0
    for place, (example, answer) in enumerate(zip(wanted.examples, given, strict=True), start=1):
        said = answer["label"] if example.check == "label" else answer["text"]
        why = fails(example, said)
        if why is None:
            passed += 1
        elif first is None:
            shown = said if not isinstance(said, str) else said[:SHOWN]
            first = {"example": place, "text": example.text[:SHOWN], "expected": example.words() + why, "given": shown}
    return GoldenReplay(digest, passed, len(given), first, now())


def fails(example: Example, given: Any) -> str | None:
    """None where it passes; else what there is to say beside the answer."""
    wanted = example.wanted
    if example.check == "label":
        right = tuple(sorted(given)) == example.labels if isinstance(given, list) else given == wanted
    elif example.check == "contains":
        right = all(part in given for part in ([wanted] if isinstance(wanted, str) else wanted))
    elif example.check == "equals":
        right = given.strip() == str(wanted).strip()
    else:
        from turret.tasks.metrics import rouge_l

        score = rouge_l(given, str(wanted))
        assert example.min_score is not None
        return None if score >= example.min_score else f", scored {score:.3f}"
    return None if right else ""
