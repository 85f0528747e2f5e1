"""Tables of papers: their runs, results and pages."""
