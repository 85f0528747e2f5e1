"""Named experiments: one file per paper, nothing but names, rows and published values."""
