"""Named experiments: one file per paper, nothing but names, rows and published values."""

IN_PRINT = "in_print."  # the beginning of a path that no report has: a column of a paper which metajax does not measure
