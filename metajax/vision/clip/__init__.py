"""CLIP's two towers, and prompt learners on top of them."""
