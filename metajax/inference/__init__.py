"""Text generation with caches."""
