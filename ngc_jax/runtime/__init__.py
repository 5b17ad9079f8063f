"""Files, processes, signals and checkpoints of a run. Knows no model and no config."""
