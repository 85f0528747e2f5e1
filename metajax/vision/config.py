"""Typed configuration of runs on images: training a CLIP, or training a prompt learner on a frozen CLIP.

Name, scale, seed, init, runtime, overrides, hash and run directories mean the same as for text; the model, the data and the
objective differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from metajax.config.experiment import AnyConfig
from metajax.config.runtime import Runtime
from metajax.config.training import Init, Optimizer, Training
from metajax.core.errors import nearest, require
from metajax.core.fields import CountOrZero, NotNegative, OnlyWith, Part, Positive, Range, Share, Size, SizeOrZero
from metajax.vision.clip.config import Clip

AUGMENTATIONS = (  # in metajax/vision/data/augmentations.py
    *("color_jitter_red", "color_jitter_green", "color_jitter_blue", "grayscale", "gaussian_noise", "gaussian_blur"),
    *("horizontal_flip", "vertical_flip", "rotation_90", "rotation_180", "rotation_270", "crop", "cutout", "sobel_filter"),
)
Triplets = OnlyWith("alpha", why="without prompts.alpha there are no triplets")
Paired = OnlyWith("paired", why="it is for pairs of augmentations, as with prompts.alpha")
Augmented = OnlyWith("augmented", why="nothing is augmented")


@dataclass(frozen=True)
class Images(Part, path="images"):
    """The images. A source is KIND[:PATH], see metajax/vision/data/sources.py."""

    sources: tuple[str, ...] = ("emoji",)  # a CLIP is trained on all of them; a prompt learner has one
    targets: tuple[str, ...] = ()  # other sources on which a prompt learner is also tested, with all their classes
    classes: Literal["all", "base"] = "all"  # base: train on the first half of the classes and test the others separately
    shots: CountOrZero = 16  # training images of each class; 0: all
    view: Literal["crop", "centre"] = "crop"  # of a training image: a random crop, perhaps mirrored, or the centre
    crop_area: Annotated[float, Range(above=0, most=1)] = 0.08  # least share of the image that a random crop covers
    # Images of a CLIP's step, at least 2, because the loss compares texts with each other. A prompt learner uses `prompts.batch`.
    batch: Annotated[int, Range(2, 2**20)] = 96
    template: str = ""  # with {} for the class name, used if no context is learned; "": the source's template
    ensemble: bool = False  # use the mean of seven templates (and the source's own) instead

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "images.sources is empty; name at least one, such as emoji")
        has_blank = not self.template or "{}" in self.template
        require(has_blank, f"images.template = {self.template!r} has no {{}} for the class's name")


@dataclass(frozen=True)
class Prompts(Part, path="prompts"):
    """A prompt learner. Its switches choose CoOp (arXiv 2109.01134), CoCoOp (2203.05557) or AAPL (2404.16804).

    CoOp is the default; condition = "meta" gives CoCoOp; alpha > 0 as well gives AAPL. context = 0: zero-shot by templates.
    """

    context: Annotated[int, Range(0, 1024)] = 4  # M vectors before a class name
    context_init: str = ""  # words whose embeddings initialise the vectors, one word each; "": N(0, 0.02^2)
    class_specific: bool = False  # each class has its own vectors
    class_position: Literal["end", "middle", "front"] = "end"
    # Added to every context vector. meta: the meta-net's output for the image. delta: its change under an augmentation, which the
    # released AAPL never uses. The paper names no augmentation for tests; there it is the mean delta over all augmentations.
    condition: Literal["none", "meta", "delta"] = "none"
    bottleneck: SizeOrZero = 0  # width of the meta-net; 0: a 16th of the width of the image features
    augment: Share = 0.0  # probability of one augmentation of the classified image (CoCoOp with augmentation)
    alpha: NotNegative = 0.0  # weight of the adversarial triplet loss
    beta: NotNegative = 1.0  # weight of the cross-entropy
    margin: Annotated[NotNegative, Triplets] = 0.2
    # triplets; the two beyond are inferred, not stated in the paper
    constraints: Annotated[Literal["two", "four"], Triplets] = "two"
    triplet_of: Annotated[Literal["delta", "meta"], Triplets] = "delta"
    augmentations: Annotated[tuple[str, ...], Augmented] = AUGMENTATIONS
    # weighted: those whose deltas are poorly separated more often, by epoch
    sampling: Annotated[Literal["uniform", "weighted"], Paired] = "uniform"
    # where augmentations work; the released code's is the first
    space: Annotated[Literal["normalised", "rgb"], Augmented] = "normalised"
    # dtype of the frozen CLIP; None: the CLIP's own, or float32 for published weights.
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    epochs: Annotated[int, Range(0, 10**6)] = 10
    batch: Size = 1
    learning_rate: Positive = 0.002
    warmup_rate: NotNegative = 1e-5  # learning rate of the first epoch
    weight_decay: NotNegative = 5e-4

    def __post_init__(self) -> None:
        for name in self.augmentations:
            known = f"unknown {name!r}{nearest(name, AUGMENTATIONS)}; known: {', '.join(AUGMENTATIONS)}"
            require(name in AUGMENTATIONS, f"prompts.augmentations: {known}")
        require(len(set(self.augmentations)) >= 2, f"prompts.augmentations = {self.augmentations}: at least two different ones")
        conditioned = self.condition != "none"
        require(conditioned or not self.alpha, "prompts.alpha: there is no meta-net to train; set prompts.condition=meta")
        require(self.context > 0 or not conditioned, "prompts.condition: there is no context to add to; set prompts.context=4")
        needs = f"with prompts.condition = {self.condition!r} the name comes last"
        ends = not conditioned or self.class_position == "end"
        require(ends, f"prompts.class_position = {self.class_position!r}: {needs}")
        words, context = len(self.context_init.split()), self.context
        agrees = f"prompts.context_init has {words} words but prompts.context = {context}; they must agree"
        require(words in (0, context), agrees)

    @property
    def paired(self) -> bool:
        """Whether a step reads a second image, and both images under two augmentations."""
        return self.alpha > 0 or self.condition == "delta"

    @property
    def augmented(self) -> bool:
        """Whether any image is augmented."""
        return self.paired or self.augment > 0


@dataclass(frozen=True)
class ImageConfig(AnyConfig):
    """One whole run on images: with `prompts` a learner on a frozen CLIP, without it a CLIP trained from scratch."""

    family = "images"
    unavailable = ("runtime.implementation", "training.objective")  # CLIP has no Pallas kernels; `prompts` chooses the objective

    images: Images = field(default_factory=Images)
    clip: Clip | None = None  # None: the CLIP of `weights`, or of the run in `init.from`
    weights: str = ""  # folder or .pt file below the data folder that holds a published CLIP and its vocabulary
    prompts: Prompts | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)  # for a CLIP; a prompt learner has its own optimizer settings
    training: Training = field(default_factory=Training)
    init: Init = field(default_factory=Init)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        if self.prompts is None:
            require(self.clip is not None and not self.weights, "without `prompts` a CLIP is trained from its start: give `clip`")
            return
        sources, (field, batch, pieces) = self.images.sources, self.batch
        require(len(sources) == 1, f"images.sources = {sources}: a prompt learner has one")
        has_clip = bool(self.init.from_) != bool(self.weights)
        require(has_clip, "a prompt learner needs a CLIP: init.from, a run, or weights, a folder")
        require(batch % pieces == 0, f"{field} = {batch} does not divide by training.accumulation_steps = {pieces}")

    def unread(self) -> dict[str, str]:
        """{field: why nothing reads it} for a run of this kind."""
        found, templates = super().unread(), ("images.template", "images.ensemble")
        if self.prompts is None:
            of_learners = ("images.targets", "images.classes", "images.shots")
            found |= dict.fromkeys(of_learners, "it is for prompt learners, and this trains a CLIP")
            found |= dict.fromkeys(templates, "a CLIP in training is tested with the templates of its sources")
            why = "each image is compared with all texts of its batch, so that micro-batches would have another loss"
            found |= {"training.accumulation_steps": why, "init.from_": "a CLIP is trained from its start"}
            return found | {"optimizer.z_loss": "the loss of a CLIP has no such term"}
        of_optimizer = (f"optimizer.{f.name}" for f in fields(Optimizer))
        found |= dict.fromkeys(of_optimizer, "a prompt learner has SGD: prompts.learning_rate")
        found |= {"training.steps": "a prompt learner has epochs: prompts.epochs"}
        found |= {"images.batch": "a prompt learner has its own: prompts.batch"}
        found |= {"clip": "the CLIP is that of init.from or weights"}
        learned = "the context is learned; it is for prompts.context=0"
        return found | dict.fromkeys(templates if self.prompts.context else (), learned)

    @property
    def batch(self) -> tuple[str, int, int]:
        if self.prompts is None:
            return "images.batch", self.images.batch, 1
        return "prompts.batch", self.prompts.batch, self.training.accumulation_steps

    @property
    def tested(self) -> tuple[str, ...]:
        """Names of the accuracies in the report, without those of `images.targets`."""
        if self.prompts is None:
            return self.images.sources
        return ("base", "new") if self.images.classes == "base" else ("all",)

    @property
    def still(self) -> bool:
        """Whether a learner's training images are the same in every step, so that their features are too."""
        return self.images.view == "centre" and not (self.prompts and self.prompts.augmented)
