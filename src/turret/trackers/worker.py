"""The process of one tracker: reads messages from stdin, calls the tracker, and answers each one on stdout.

    python -m turret.trackers.worker MODULE:CLASS

A message is a line of JSON with one key: `start` (the fields of a `TrackedRun`), `log` (a list of steps with their
values) or `finish` (a state and a summary). An answer is `{}`, or `{"error": "..."}`, after which the process ends. If
stdin ends first, the training was killed, and the run is marked as interrupted.

What the tracker's library prints goes to stderr, which is a file of the run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TextIO

from turret.errors import one_line
from turret.trackers.table import Message, Point, TrackedRun, Tracker


def main(at: str, messages: TextIO, answers: TextIO) -> None:
    """Carry out the messages until `finish`, an error, or the end of the stream."""
    tracker: Tracker | None = None
    try:
        for line in messages:
            message: Message = json.loads(line)
            if "start" in message:
                module, _, name = at.partition(":")
                tracker = getattr(importlib.import_module(module), name)()
            assert tracker is not None, "the first message is start"
            _carry_out(tracker, message)
            _answer(answers, {})
            if "finish" in message:
                return
        if tracker is not None:
            tracker.finish("interrupted", {})
    except Exception as error:  # whatever a tracker's library raises
        _answer(answers, {"error": one_line(f"{type(error).__name__}: {error}", 160)})


def _carry_out(tracker: Tracker, message: Message) -> None:
    if "start" in message:
        tracker.start(TrackedRun(**message["start"]))
    elif "log" in message:
        tracker.log([Point(step, values) for step, values in message["log"]])
    else:
        tracker.finish(message["finish"]["state"], message["finish"]["summary"])


def _answer(answers: TextIO, value: dict[str, str]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _own_streams() -> tuple[TextIO, TextIO]:
    """The streams of messages and answers, moved away from 0 and 1: the library reads nothing and prints to stderr."""
    messages = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return messages, answers


if __name__ == "__main__":
    main(sys.argv[1], *_own_streams())
