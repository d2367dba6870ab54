"""python tests/server/echo_server.py STORE PACE: a server over the echo in a process of its own, to be sent signals."""

from __future__ import annotations

import sys
from pathlib import Path

from server.echo import Echo, Options

from turret.server.run import bind, run
from turret.server.state import ServerState
from turret.workspace import Workspace

if __name__ == "__main__":
    workspace = Workspace(Path(sys.argv[1]))
    with Echo(workspace.store, pace=float(sys.argv[2])) as engine, bind("127.0.0.1", 0) as listening:
        run(ServerState(workspace, engine, Options), listening, lambda url: print(url, flush=True))
