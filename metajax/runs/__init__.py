"""The contents of a run's folder: config.json, metrics, goodput, parents, and the lock on it."""
