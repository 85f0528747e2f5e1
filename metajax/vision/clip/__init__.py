"""CLIP's two towers and the prompt learners beside them."""
