"""The control plane: routes under `/api/` for adapters, trainings, experiments, panels and accounts."""
