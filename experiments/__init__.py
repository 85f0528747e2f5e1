"""Named experiments: one file per paper, with only names, rows and published values."""

IN_PRINT = "in_print."  # prefix of a path that no report has, for a paper's column that metajax does not measure
