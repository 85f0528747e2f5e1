"""What people look at: the terminal, pages and figures."""
