"""The server of `echo_server.py` with one more route, which freezes the event loop for some texts.

python tests/server/freezing_server.py STORE
"""

from __future__ import annotations

import sys
import time

from server import echo_server

from turret.server import app
from turret.server.routes import Model, Text, router

careless = router("infer")


class Asked(Model):
    text: Text


@careless.post("/v1/careless")
async def freeze(body: Asked) -> int:
    """As a parser with quadratic time for percent signs."""
    until = time.thread_time() + (1.0 if body.text.count("%") > 10_000 else 0.0)
    count = 0
    while time.thread_time() < until:
        count += 1
    return count


if __name__ == "__main__":
    app.ROUTERS = (*app.ROUTERS, careless)
    echo_server.main(sys.argv[1], "0")
