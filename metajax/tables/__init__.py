"""A paper's table: its runs, its results and its page."""
