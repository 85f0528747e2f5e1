"""What a run's folder holds: config.json, metrics, goodput, parents, and the lock on it."""
