"""Synthetic tasks as training and evaluation rows (Language Modeling with Learned Meta-Tokens, section 4)."""
