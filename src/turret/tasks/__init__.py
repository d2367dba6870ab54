"""What an example, a target, a loss and a metric are for classify, summarize and generate; and reading tables.

Knows texts, labels and tokenizers. Refuses to know training, serving, stores and adapters. Importing the package or
its `tables` loads no torch; `make`, `classify`, `generate` and `metrics` do.
"""

from turret.tasks.task import Encoded, Example, Kind, Labelled, Pair, Task, texts_of

__all__ = ["Encoded", "Example", "Kind", "Labelled", "Pair", "Task", "texts_of"]
