"""Numbers of a trained model: held-out bits per byte, tasks, multiple choice, preferences, and their intervals."""
