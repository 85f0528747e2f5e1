"""A tiny CLIP and a prompt learner on it, for tests of runs on images."""

from metajax.config import Init, Optimizer, Runtime, Training
from metajax.core.fields import override
from metajax.vision.clip.config import Clip
from metajax.vision.config import ImageConfig, Images, Prompts

_VISION = {"vision_layers": (1,), "vision_width": 16, "vision_heads": 2, "patch": 8, "image_size": 16}
_TEXT = {"text_layers": 1, "text_width": 16, "text_heads": 2, "context": 16, "vocab": 64}
CLIP = ImageConfig(
    name="small_clip",
    images=Images(sources=("digits",), crop_area=0.5, batch=8),
    clip=Clip(**_VISION, **_TEXT, embed=16),
    optimizer=Optimizer(warmup_steps=1),
    training=Training(steps=6),
    runtime=Runtime(log_every=1),
)
_PROMPTS = Prompts(condition="meta", alpha=0.2, bottleneck=16, epochs=3, learning_rate=0.05, sampling="weighted")


def learner(clip, **changes):
    """The config of a learner on the CLIP of that run, for the base classes, with changes by field."""
    images, runtime = Images(sources=("digits",), classes="base", shots=1, crop_area=0.5), Runtime(log_every=1)
    made = ImageConfig(name="learner", images=images, prompts=_PROMPTS, init=Init(str(clip)), runtime=runtime)
    return override(made, changes)
