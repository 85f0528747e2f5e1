"""State dicts of GPT-2 in the layouts of nanoGPT and Hugging Face, for comparison with both.

nanoGPT stores linear maps as [out, in], uses the exact (erf) GELU and ties the head.
"""

from dataclasses import replace

from metajax.core.errors import require
from metajax.interop.gpt2 import LAYOUT, names
from metajax.interop.layouts import load_model, require_fields, tensors_of

NANOGPT = replace(LAYOUT, family="nanoGPT", turned=(".w",), fields=LAYOUT.fields | {"activation": ("gelu",), "tied": (True,)})
LAYOUTS = {"nanogpt": NANOGPT, "huggingface": LAYOUT}


def layout_of(cfg, name):
    """The layout of that name; UserError if there is none or the model is not of its family."""
    require(name in LAYOUTS, f"layout = {name!r}; known: {', '.join(LAYOUTS)}")
    require_fields(cfg, LAYOUTS[name])
    return LAYOUTS[name]


def from_gpt2(state, cfg, layout, runtime=None):
    """An LM with the weights of a state dict, which decides the number of rows and positions."""
    state = names(state)
    length = len(state["transformer.wpe.weight"])
    return load_model(state, cfg, layout_of(cfg, layout), max_length=length, runtime=runtime)


def to_gpt2(model, layout):
    """The state dict of an LM, without the tied head."""
    return dict(tensors_of(model, layout_of(model.cfg, layout)))
