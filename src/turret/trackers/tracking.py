"""All trackers of one run. No function here raises because of a tracker; one line reports an outage, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from turret.trackers.table import TRACKERS, Entry, Point, State, TrackedRun
from turret.trackers.tracker_process import Patience, TrackerProcess


class Tracking:
    """The trackers that follow a run.

    Args:
        warn: gets one line when a tracker fails; called in the thread of the training.
        table: what the names mean.
    """

    def __init__(
        self,
        names: Iterable[str],
        run: TrackedRun,
        warn: Callable[[str], None],
        *,
        table: Mapping[str, Entry] = TRACKERS,
        patience: Patience | None = None,
    ) -> None:
        self._warn = warn
        self.warnings: list[str] = []
        folder = Path(run.folder)
        self._processes = {
            name: TrackerProcess(table[name].at, run, folder / f"tracker-{name}.log", patience or Patience())
            for name in dict.fromkeys(names)
        }
        self._folder = folder

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the numbers of a step to all trackers. Never waits."""
        for process in self._processes.values():
            process.log(Point(step, values))
        self._look()

    def end(self, state: State, summary: Mapping[str, float | str]) -> None:
        """End the run in all trackers, in a bounded time. A tracker that does not end by then is left behind."""
        for process in self._processes.values():
            process.end(state, summary)
        for process in self._processes.values():
            process.wait()
        self._look("")
        self._processes.clear()

    def _look(self, then: str = "; the training goes on without it") -> None:
        """Leave out the trackers that have failed, each with a warning."""
        for name, process in list(self._processes.items()):
            if (problem := process.problem()) is not None:
                process.leave()
                del self._processes[name]
                line = f"tracker {name}: {problem}{then} (what it printed: {self._folder / f'tracker-{name}.log'})"
                self.warnings.append(line)
                self._warn(line)
