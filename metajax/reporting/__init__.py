"""Output for people: the terminal, pages and figures."""
