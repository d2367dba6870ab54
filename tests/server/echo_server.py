"""A server over the echo in a process of its own, to be sent signals.

    python tests/server/echo_server.py STORE PACE [BASE FINGERPRINT]

The echo answers with the adapters of the base with this fingerprint; BASE is the id of that base.
"""

from __future__ import annotations

import sys

from server.echo import Echo, Options

from turret.server.run import bind, run
from turret.server.state import ServerState
from turret.workspace import Workspace


def main(store: str, pace: str, *base: str) -> None:
    workspace, more = Workspace(store), dict(zip(("base_id", "fingerprint"), base, strict=False))
    with Echo(workspace.store, pace=float(pace), **more) as engine, bind("127.0.0.1", 0) as listening:
        run(ServerState(workspace, engine, Options), listening, lambda url: print(url, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
