"""Train steps compiled for TPU slices that are not available: memory, collectives, schedules, advice."""
