"""Numbers of a trained model: validation bits per byte, tasks, multiple choice, preferences, and their intervals."""
