"""CLIP weights in the layouts of OpenAI and Hugging Face: names of tensors, and published folders.

open_clip keeps OpenAI's names. OpenAI's own files are TorchScript archives, which only PyTorch reads; nothing else here needs it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metajax.config import PIXEL_MEAN, PIXEL_STD, Clip, Runtime
from metajax.core.errors import require
from metajax.core.progress import warn
from metajax.interop.files import WHOLE, open_directory, open_tensors, read_json
from metajax.interop.layouts import Layout, Stored, Tensor, fill, stored_of
from metajax.vision.clip.model import CLIP

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", WHOLE)


def _linear(tensor: str, path: str) -> dict[str, str]:
    return {f"{tensor}.weight": f"{path}.w", f"{tensor}.bias": f"{path}.b"}


def _norm(tensor: str, path: str) -> dict[str, str]:
    return {f"{tensor}.weight": f"{path}.scale", f"{tensor}.bias": f"{path}.bias"}


def _of_layer(*tables: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {tensor: (path,) for table in tables for tensor, path in table.items()}


def _conv_norm(conv: str, norm: str, path: str) -> dict[str, str]:
    statistics = {f"{norm}.running_mean": f"{path}.norm.mean", f"{norm}.running_var": f"{path}.norm.var"}
    return {f"{conv}.weight": f"{path}.conv.kernel"} | _norm(norm, f"{path}.norm") | statistics


def _resnet(blocks: tuple[int, ...]) -> dict[str, str]:
    """OpenAI's names of the convolutional tower; `blocks`: number of blocks in each stage."""
    table = {"visual.attnpool.positional_embedding": "visual.pool.positions"}
    for theirs, ours in {"q": "query", "k": "key", "v": "value", "c": "output"}.items():
        table |= _linear(f"visual.attnpool.{theirs}_proj", f"visual.pool.{ours}")
    for n in range(3):
        table |= _conv_norm(f"visual.conv{n + 1}", f"visual.bn{n + 1}", f"visual.stem.{n}")
    for stage, count in enumerate(blocks):
        for block in range(count):
            theirs, ours = f"visual.layer{stage + 1}.{block}", f"visual.stages.{stage}.{block}"
            for n, part in enumerate(("reduce", "spatial", "expand"), start=1):
                table |= _conv_norm(f"{theirs}.conv{n}", f"{theirs}.bn{n}", f"{ours}.{part}")
            table |= _conv_norm(f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut")
    return table


_FUSED = {
    f"attn.in_proj_{theirs}": tuple(f"attention.{part}.{ours}" for part in ("query", "key", "value"))
    for theirs, ours in {"weight": "w", "bias": "b"}.items()
}
_OPENAI: dict[str, Any] = {
    "whole": {
        "token_embedding.weight": "text.embedding",
        "positional_embedding": "text.positions",
        "text_projection": "text.projection",
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "visual.conv1.weight": "visual.patches.kernel",
        "visual.class_embedding": "visual.class_token",
        "visual.positional_embedding": "visual.positions",
        "visual.proj": "visual.projection",
    }
    | _norm("ln_final", "text.final_norm")
    | _norm("visual.ln_pre", "visual.pre_norm")
    | _norm("visual.ln_post", "visual.final_norm"),
    "layer": _FUSED
    | _of_layer(
        _linear("attn.out_proj", "attention.output"), _linear("mlp.c_fc", "mlp.up"), _linear("mlp.c_proj", "mlp.down"),
        _norm("ln_1", "attention_norm"), _norm("ln_2", "mlp_norm"),
    ),
    "prefix": "{tower}transformer.resblocks.{layer}.",
    "buffers": ("num_batches_tracked", "input_resolution", "context_length", "vocab_size", "attn_mask"),
}  # fmt: skip
_HUGGINGFACE = Layout(
    family="Hugging Face's CLIP",
    whole={
        "text_model.embeddings.token_embedding.weight": "text.embedding",
        "text_model.embeddings.position_embedding.weight": "text.positions",
        "text_projection.weight": "text.projection",
        "logit_scale": "logit_scale",
        "vision_model.embeddings.patch_embedding.weight": "visual.patches.kernel",
        "vision_model.embeddings.class_embedding": "visual.class_token",
        "vision_model.embeddings.position_embedding.weight": "visual.positions",
        "visual_projection.weight": "visual.projection",
    }
    | _norm("text_model.final_layer_norm", "text.final_norm")
    | _norm("vision_model.pre_layrnorm", "visual.pre_norm")  # spelled so in Hugging Face's files
    | _norm("vision_model.post_layernorm", "visual.final_norm"),
    layer=_of_layer(
        *(_linear(f"self_attn.{part[0]}_proj", f"attention.{part}") for part in ("query", "key", "value")),
        _linear("self_attn.out_proj", "attention.output"), _linear("mlp.fc1", "mlp.up"), _linear("mlp.fc2", "mlp.down"),
        _norm("layer_norm1", "attention_norm"), _norm("layer_norm2", "mlp_norm"),
    ),
    prefix="{tower}_model.encoder.layers.{layer}.",
    turned=(".w", ".projection"),
    buffers=("position_ids",),
)  # fmt: skip
# The layout's names of the towers.
_TOWERS = {"openai": {"visual": "visual.", "text": ""}, "huggingface": {"visual": "vision", "text": "text"}}


def layout_of(cfg: Clip, kind: str) -> Layout:
    """The layout "openai" or "huggingface" of a CLIP."""
    if kind == "huggingface":
        return _HUGGINGFACE
    resnet = {} if cfg.patch else _resnet(cfg.vision_layers)
    return Layout(family="OpenAI's CLIP", **{**_OPENAI, "whole": _OPENAI["whole"] | resnet})


def clip_tensors(model: CLIP, kind: str) -> dict[str, Stored]:
    """Every tensor of a (possibly abstract) CLIP in a layout."""
    layout, layers = layout_of(model.cfg, kind), []
    for tower, word in _TOWERS[kind].items():
        count = model.cfg.text_layers if tower == "text" else sum(model.cfg.vision_layers)
        prefix = f"{tower}.transformer.blocks."
        layers += [(layout.prefix.format(tower=word, layer=layer), prefix, layer) for layer in range(count)]
    return stored_of(model, layout, layers)


def from_state(state: Mapping[str, Tensor], cfg: Clip, kind: str, runtime: Runtime | None = None) -> CLIP:
    """A CLIP with the weights of a state dict, float32. UserError names a missing, extra or misshapen tensor."""
    model = jax.eval_shape(lambda: CLIP(cfg, runtime=runtime or Runtime(), key=jax.random.key(0)))
    return fill(model, clip_tensors(model, kind), state, layout_of(cfg, kind))


def load_clip(folder: Path, runtime: Runtime | None = None, compute_dtype: str = "float32") -> CLIP:
    """Load the CLIP of a Hugging Face (config.json) or open_clip (open_clip_config.json) safetensors folder, or OpenAI's .pt.

    Raises:
      UserError: a file, tensor or setting is missing or not supported.
    """
    state, cfg, kind = _open_published(folder)
    return from_state(state, replace(cfg, compute_dtype=compute_dtype), kind, runtime)


def _open_published(folder: Path) -> tuple[Mapping[str, Tensor], Clip, str]:
    """(tensors, model, name of the layout) of an argument of `load_clip`."""
    if folder.suffix == ".pt":
        state = _read_archive(folder)
        return state, openai_config(state), "openai"
    if (folder / OPEN_CLIP_CONFIG).exists():
        weights = next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).exists()), None)
        require(weights is not None, f"{folder} has no {' and no '.join(OPEN_CLIP_WEIGHTS)}; fetch the weights as safetensors")
        values = read_json(folder / OPEN_CLIP_CONFIG)
        cfg = open_clip_config(values["model_cfg"])
        return open_tensors(weights), open_clip_pixels(values.get("preprocess_cfg", {}), cfg), "openai"
    values, tensors = open_directory(folder, "clip")
    return tensors, huggingface_pixels(_image_processor(folder), huggingface_config(values)), "huggingface"


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a TorchScript archive."""
    require(path.exists(), f"{path}: no such file; name OpenAI's .pt file, or a folder with safetensors")
    remedy = "PyTorch alone reads OpenAI's .pt files: pip install torch, or fetch the same weights as safetensors"
    require(find_spec("torch") is not None, f"{path}: {remedy}")
    import torch

    tensors = torch.jit.load(path, map_location="cpu").state_dict()
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def openai_config(state: Mapping[str, Tensor]) -> Clip:
    """The model, from the shapes of OpenAI's tensors; heads are 64 wide. UserError if the tensors are not OpenAI's."""
    wanted = ("visual.conv1.weight", "token_embedding.weight", "text_projection", "positional_embedding")
    missing = [name for name in wanted if name not in state]
    require(not missing, f"the checkpoint lacks {', '.join(missing)}: not OpenAI's CLIP")
    names, (vocab, text_width) = state.keys(), state["token_embedding.weight"].shape
    if "visual.proj" in state:
        width, _, _, patch = state["visual.conv1.weight"].shape
        side = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
        image = {
            "vision_layers": (_count(names, "visual.transformer.resblocks."),),
            "vision_width": width,
            "vision_heads": width // 64,
        }
        image |= {"patch": patch, "image_size": side * patch}
    else:
        stages = tuple(_count(names, f"visual.layer{stage}.") for stage in range(1, 5))
        width, side = (
            state["visual.layer1.0.conv1.weight"].shape[0],
            math.isqrt(state["visual.attnpool.positional_embedding"].shape[0]),
        )
        image = {"vision_layers": stages, "vision_width": width, "vision_heads": width // 2, "image_size": 32 * side}
    return Clip(
        **image, text_width=text_width, text_heads=text_width // 64, embed=state["text_projection"].shape[1], vocab=vocab,
        text_layers=_count(names, "transformer.resblocks."), context=state["positional_embedding"].shape[0],
    )  # fmt: skip


def _count(names: Collection[str], prefix: str) -> int:
    """The number of layers whose tensors have that prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def open_clip_config(values: Mapping[str, Any]) -> Clip:
    """The model of an open_clip_config.json's `model_cfg`. UserError for a setting that is not supported."""
    image, text = values["vision_cfg"], values["text_cfg"]
    _only("vision_cfg", image, {"image_size", "layers", "width", "patch_size", "head_width"})
    _only("text_cfg", text, {"context_length", "vocab_size", "width", "heads", "layers"})
    _only("model_cfg", values, {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_bias", "init_logit_scale"})
    layers, patch = image["layers"], image.get("patch_size")
    convolutional = isinstance(layers, list)
    sizes = {f"vision_cfg.{name}": image[name] for name in ("width", "image_size")} | {
        "vision_cfg.head_width": image.get("head_width", 64)
    }
    sizes |= {f"vision_cfg.layers[{n}]": count for n, count in enumerate(layers if convolutional else [layers])}
    sizes |= {f"text_cfg.{name}": text[name] for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    _sizes(
        OPEN_CLIP_CONFIG, sizes | {"embed_dim": values["embed_dim"]} | ({} if convolutional else {"vision_cfg.patch_size": patch})
    )
    # A ResNet's attention pool is 32 times as wide as its first stage.
    heads = image["width"] * (32 if convolutional else 1) // image.get("head_width", 64)
    return Clip(
        vision_layers=tuple(layers) if convolutional else (layers,), vision_width=image["width"], vision_heads=heads,
        text_width=text["width"], text_heads=text["heads"], embed=values["embed_dim"], patch=patch or 0,
        image_size=image["image_size"], text_layers=text["layers"], context=text["context_length"], vocab=text["vocab_size"],
        activation="quick_gelu" if values.get("quick_gelu", False) else "gelu",
        loss="sigmoid" if "init_logit_bias" in values else "softmax",
    )  # fmt: skip


def _sizes(file: str, sizes: Mapping[str, Any]) -> None:
    """Raise UserError for a size that is not an integer, or too large for any CLIP."""
    for name, size in sizes.items():
        fits = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= (1_000 if "layers" in name else 10_000_000)
        require(fits, f"{file}: {name} = {size!r} is not a size that a CLIP can have; fetch the file again")


def _only(what: str, values: Mapping[str, Any], known: set[str]) -> None:
    other = sorted(values.keys() - known)
    require(not other, f"{OPEN_CLIP_CONFIG}: {what} has {', '.join(other)}, which this CLIP cannot follow")


def open_clip_pixels(values: Mapping[str, Any], cfg: Clip) -> Clip:
    """The model with the normalisation of an open_clip_config.json's `preprocess_cfg`. UserError for other preprocessing."""
    same = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB", "size": cfg.image_size}
    for name, value in values.items():
        if name in same:
            sides = [value] if name != "size" or isinstance(value, int) else value
            require(
                all(side == same[name] for side in sides),
                f"{OPEN_CLIP_CONFIG}: preprocess_cfg.{name} = {value!r}, but only {same[name]!r} is supported here",
            )
    _only("preprocess_cfg", values, {*same, "mean", "std", "fill_color"})  # nothing is filled if the short side fits
    return _with_pixels(f"{OPEN_CLIP_CONFIG}: preprocess_cfg", cfg, values.get("mean"), values.get("std"))


def _with_pixels(what: str, cfg: Clip, mean: Any, std: Any) -> Clip:
    """The model with this mean and deviation of pixels; None: OpenAI's."""
    for name, numbers in (("mean", mean), ("std", std)):
        fits = numbers is None or (
            isinstance(numbers, list)
            and len(numbers) == 3
            and all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
        )
        require(fits, f"{what}: {name} = {numbers!r} is not a number for each of three channels")
    mean, std = (None if numbers is None else tuple(map(float, numbers)) for numbers in (mean, std))
    return replace(cfg, pixel_mean=None if mean == PIXEL_MEAN else mean, pixel_std=None if std == PIXEL_STD else std)


def _image_processor(folder: Path) -> Mapping[str, Any]:
    """The image settings of a Hugging Face folder; warns if there are none."""
    single, together = folder / "preprocessor_config.json", folder / "processor_config.json"
    if single.exists():
        return read_json(single)
    if together.exists():
        return read_json(together)["image_processor"]
    warn(f"{folder} has no {single.name}: images are normalised with OpenAI's mean and deviation")
    return {}


def huggingface_pixels(values: Mapping[str, Any], cfg: Clip) -> Clip:
    """The model with the normalisation of a preprocessor_config.json. UserError for other preprocessing."""
    size, sides = cfg.image_size, {"shortest_edge": cfg.image_size}
    square = {"height": size, "width": size}
    # The supported value of each setting, as files write it; 3 is bicubic.
    known: dict[str, tuple[Any, ...]] = {
        "do_resize": (True,), "size": (size, sides), "resample": (3,), "do_center_crop": (True,), "crop_size": (size, square),
        "do_rescale": (True,), "do_normalize": (True,), "do_convert_rgb": (True, None), "do_pad": (False, None),
    }  # fmt: skip
    for name, ways in known.items():
        found = values.get(name, ways[0])
        require(found in ways, f"preprocessor_config.json: {name} = {found!r}, but only {ways[0]!r} is supported here")
    factor = values.get("rescale_factor", 1 / 255)
    require(
        isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6),
        f"preprocessor_config.json: rescale_factor = {factor!r}, but only 1/255 is supported here",
    )
    told = values.keys() - known.keys() - {"rescale_factor", "image_mean", "image_std", *_TOLD}
    if told:
        warn(f"preprocessor_config.json: {', '.join(sorted(told))} not known here, and left out of account")
    return _with_pixels("preprocessor_config.json", cfg, values.get("image_mean"), values.get("image_std"))


# Entries of a preprocessor_config.json that change no pixel.
_TOLD = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "data_format",
    "input_data_format",
    "device",
    "return_tensors",
)
# Hugging Face leaves out settings that equal these defaults.
_COMMON = {
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12, "attention_dropout": 0.0, "initializer_factor": 1.0,
    "initializer_range": 0.02, "projection_dim": 512,
}  # fmt: skip
_TEXT = _COMMON | {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49_408,
    "bos_token_id": 49_406, "eos_token_id": 49_407, "pad_token_id": 1,
}  # fmt: skip
_VISION = _COMMON | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "num_channels": 3,
}  # fmt: skip


def _tower(values: Mapping[str, Any], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """A tower's settings. An older `NAME_dict` and its defaults override NAME, as in the transformers library."""
    own, older = values.get(name) or {}, values.get(f"{name}_dict")
    for what, found in ((name, own), (f"{name}_dict", older or {})):
        require(isinstance(found, dict), f"config.json: {what} is {type(found).__name__}, not a JSON object")
    return defaults | own | ({} if older is None else defaults | older)


def huggingface_config(values: Mapping[str, Any]) -> Clip:
    """The model of a config.json. UserError for a setting that is not supported."""
    text, image = _tower(values, "text_config", _TEXT), _tower(values, "vision_config", _VISION)
    for what, part in {"text_config": text, "vision_config": image}.items():
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        names += ("max_position_embeddings", "vocab_size") if part is text else ("image_size", "patch_size")
        _sizes("config.json", {f"{what}.{name}": part[name] for name in names})
        wanted = {"intermediate_size": 4 * part["hidden_size"], "layer_norm_eps": 1e-5, "hidden_act": text["hidden_act"]}
        for name, value in wanted.items():
            require(part[name] == value, f"config.json: {what}.{name} = {part[name]!r}, but only {value!r} is supported here")
    require(image["num_channels"] == 3, f"config.json: vision_config.num_channels = {image['num_channels']!r}, but images have 3")
    # The features of a text are those of its end token: the largest id if the setting is 2 (an older default), else that id.
    last = text["vocab_size"] - 1
    require(
        text["eos_token_id"] in (2, last, 49_407),
        f"config.json: text_config.eos_token_id = {text['eos_token_id']!r}, but only the largest id, {last}, is supported here",
    )
    known = ("quick_gelu", "gelu")
    require(text["hidden_act"] in known, f"config.json: hidden_act = {text['hidden_act']!r}; supported: {', '.join(known)}")
    _sizes("config.json", {"projection_dim": values.get("projection_dim", 512)})
    return Clip(
        vision_layers=(image["num_hidden_layers"],), vision_width=image["hidden_size"], vision_heads=image["num_attention_heads"],
        text_width=text["hidden_size"], text_heads=text["num_attention_heads"], embed=values.get("projection_dim", 512),
        patch=image["patch_size"], image_size=image["image_size"], text_layers=text["num_hidden_layers"],
        context=text["max_position_embeddings"], vocab=text["vocab_size"], activation=text["hidden_act"],
    )  # fmt: skip
