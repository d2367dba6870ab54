"""How many files of turret a reader must open to follow one request: a warm classification, over HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from entered import Entered, watching
from server.test_end_to_end import house

from turret.ops.cpu import compiled as kernels
from turret.server.services import Followers

MOST_FILES = 40 if kernels.library() is not None else 41  # torch's operations are in other files than the kernels
REQUESTS = 5  # of the same kind; what only some of them pass is of something that runs beside them


def passed(entered: Entered, send: Any) -> dict[str, list[str]]:
    """File -> functions, of those that every one of these requests enters."""
    found: dict[str, list[str]] | None = None
    for _ in range(REQUESTS):
        entered.calls.clear()
        entered.on = True
        send()
        time.sleep(0.1)  # the engine's thread ends its turn after the answer
        entered.on = False
        files = entered.files()
        found = files if found is None else {name: found[name] for name in found if name in files}
    assert found is not None
    return found


def test_a_warm_classification_passes_few_files(tmp_path: Path) -> None:
    with watching(Followers._repeat) as entered:
        made = house(tmp_path, "bert", "classify")
        client = made.running.client()

        def classify() -> None:
            answer = client.post("/v1/classify", json={"model": "a", "input": ["a great film"]})
            assert answer.status_code == 200, answer.text

        def count() -> None:
            assert client.post("/tokenize", json={"model": "a", "prompt": "a great film"}).status_code == 200

        for _ in range(3):
            classify()
            count()
        files, other = passed(entered, classify), passed(entered, count)
        client.close()
        made.running.stop()
    print(len(files), sum(map(len, files.values())), "functions")
    for name, functions in files.items():
        print(f"{name}: {', '.join(functions)}")
    # The control: it sees the loop's thread, the threads that submit, and the engine's, and another route's file.
    assert {
        "server/app.py",
        "server/openai/classify.py",
        "server/questions.py",
        "engine/core.py",
        "adapters/hooks.py",
    } <= set(files)
    assert "server/openai/models.py" in set(other) - set(files)
    assert len(files) <= MOST_FILES, f"{len(files)} files: {', '.join(files)}"
