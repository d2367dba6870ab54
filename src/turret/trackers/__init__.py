"""Trackers show a training while it runs: Trackio, MLflow, Weights & Biases and TensorBoard, each by an extra.

Each tracker runs in a process of its own, so that one that fails, hangs or prints never touches the training. Its
library is imported in that process only, and only if the recipe names the tracker.
"""
