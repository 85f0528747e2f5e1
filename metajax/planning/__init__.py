"""Train steps compiled for TPU slices that are absent: memory, collectives, schedules, advice."""
