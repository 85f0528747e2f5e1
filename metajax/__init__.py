"""metajax: meta-tokens, hybrid heads, metadata conditioning and prompt learning as runnable, comparable experiments."""

__version__ = "0.1.0"
