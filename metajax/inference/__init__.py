"""Generation over the model's own caches."""
