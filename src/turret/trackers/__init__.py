"""Trackers show a training while it runs: Trackio, MLflow, Weights & Biases and TensorBoard, each by an extra.

Each tracker runs in a process of its own, so that one that fails, hangs or prints never touches the training. Its
library is imported in that process only, and only if the recipe names the tracker.

The trackers of `accelerate.tracking` are not used. They load torch into each of these processes, cannot find a run of
MLflow again by its id, and end every run as finished, also one that failed.
"""
