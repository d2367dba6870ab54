"""The recipe of a training: base, data, task, method and training settings as one frozen value, and as a TOML file.

It checks types and ranges, not whether a file or a column exists. Relative paths are relative to the current
directory, so that the recipe stored with a run can be run again unchanged. Importing it loads no torch.
"""

from turret.recipe.core import Data, Promise, Recipe, Size, Task, Train, keys, name_from, preset_text, presets

__all__ = ["Data", "Promise", "Recipe", "Size", "Task", "Train", "keys", "name_from", "preset_text", "presets"]
