"""A server over the echo in a process of its own, to be sent signals.

    python tests/server/echo_server.py STORE PACE [BASE FINGERPRINT]

The echo answers with the adapters of the base with this fingerprint; BASE is the id of that base. Words of the
environment: with ECHO_DIES_IN_FINISH the server is killed in the transaction that ends a batch. ECHO_TOKENIZER names a
`tokenizer.json`: constraints are then compiled for it, as the engine compiles them, in a helper process first.
"""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

from server.echo import Echo, SamplingParams

from turret.server.app import bind, run
from turret.server.engines import Engines
from turret.server.openai import batches as batch_routes
from turret.server.services import Services
from turret.store import batches
from turret.workspace import Workspace


def _prepare() -> None:
    batch_routes.POLL_SECONDS = 0.05
    if "ECHO_DIES_IN_FINISH" in os.environ:
        end = batches.Batches.end_in

        def die(*words: object, **named: object) -> None:
            end(*words, **named)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

        batches.Batches.end_in = die  # type: ignore[method-assign,assignment]


def _constraints() -> Any:
    if "ECHO_TOKENIZER" not in os.environ:
        return None
    from tokenizers import Tokenizer

    from turret.engine.structured_output import Constraints

    backend = Tokenizer.from_file(os.environ["ECHO_TOKENIZER"])
    tokenizer: Any = SimpleNamespace(backend_tokenizer=backend)
    return Constraints(tokenizer, backend.get_vocab_size(), [0])


def main(store: str, pace: str, *base: str) -> None:
    workspace, more = Workspace(store), dict[str, Any](zip(("base_id", "fingerprint"), base, strict=False))
    more["constraints"] = _constraints()
    with Echo(workspace.store, pace=float(pace), **more) as engine, bind("127.0.0.1", 0) as listening:
        run(Services(workspace, Engines(engine), SamplingParams), listening, lambda url: print(url, flush=True))


if __name__ == "__main__":
    _prepare()
    main(*sys.argv[1:])
