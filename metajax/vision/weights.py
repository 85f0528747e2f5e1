"""CLIP weights in the layouts of OpenAI and Hugging Face: names of tensors, and published folders.

open_clip keeps OpenAI's names. OpenAI's own files are TorchScript archives, which only PyTorch reads; nothing else here needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metajax.config import Runtime
from metajax.core.errors import require
from metajax.core.progress import warn
from metajax.interop.files import WHOLE, open_directory, open_tensors, read_json
from metajax.interop.layouts import Layout, Stored, Tensor, fill, pairs, stored_of
from metajax.interop.settings import MOST_LAYERS, Settings
from metajax.vision.clip.config import PIXEL_MEAN, PIXEL_STD, Clip
from metajax.vision.clip.model import CLIP

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", WHOLE)


def _conv_norm(conv: str, norm: str, path: str) -> dict[str, str]:
    statistics = {f"{norm}.running_mean": f"{path}.norm.mean", f"{norm}.running_var": f"{path}.norm.var"}
    return {f"{conv}.weight": f"{path}.conv.kernel"} | pairs({norm: f"{path}.norm"}) | statistics


def _resnet(blocks: tuple[int, ...]) -> dict[str, str]:
    """OpenAI's names of the convolutional tower; `blocks`: number of blocks in each stage."""
    table = {"visual.attnpool.positional_embedding": "visual.pool.positions"}
    for part in ("query", "key", "value"):
        table |= pairs({f"visual.attnpool.{part[0]}_proj": f"visual.pool.{part}"})
    table |= pairs({"visual.attnpool.c_proj": "visual.pool.output"})
    for n in range(3):
        table |= _conv_norm(f"visual.conv{n + 1}", f"visual.bn{n + 1}", f"visual.stem.{n}")
    for stage, count in enumerate(blocks):
        for block in range(count):
            theirs, ours = f"visual.layer{stage + 1}.{block}", f"visual.stages.{stage}.{block}"
            for n, part in enumerate(("reduce", "spatial", "expand"), start=1):
                table |= _conv_norm(f"{theirs}.conv{n}", f"{theirs}.bn{n}", f"{ours}.{part}")
            table |= _conv_norm(f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut")
    return table


_OPENAI = Layout(
    family="OpenAI's CLIP",
    whole={
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
    | pairs({"ln_final": "text.final_norm", "visual.ln_pre": "visual.pre_norm", "visual.ln_post": "visual.final_norm"}),
    layer={
        "attn.in_proj_weight": "attention.query.w attention.key.w attention.value.w",
        "attn.in_proj_bias": "attention.query.b attention.key.b attention.value.b",
    }
    | pairs({"attn.out_proj": "attention.output", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"})
    | pairs({"ln_1": "attention_norm", "ln_2": "mlp_norm"}),
    prefix="{tower}transformer.resblocks.{layer}.",
    buffers=("num_batches_tracked", "input_resolution", "context_length", "vocab_size", "attn_mask"),
)
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
    | pairs({"text_model.final_layer_norm": "text.final_norm", "vision_model.post_layernorm": "visual.final_norm"})
    | pairs({"vision_model.pre_layrnorm": "visual.pre_norm"}),  # spelled so in Hugging Face's files
    layer=pairs({f"self_attn.{part[0]}_proj": f"attention.{part}" for part in ("query", "key", "value")})
    | pairs({"self_attn.out_proj": "attention.output", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"})
    | pairs({"layer_norm1": "attention_norm", "layer_norm2": "mlp_norm"}),
    prefix="{tower}_model.encoder.layers.{layer}.",
    turned=(".w", ".projection"),
    buffers=("position_ids",),
)
# The layout's names of the towers.
_TOWERS = {"openai": {"visual": "visual.", "text": ""}, "huggingface": {"visual": "vision", "text": "text"}}


def layout_of(cfg: Clip, kind: str) -> Layout:
    """The layout "openai" or "huggingface" of a CLIP."""
    if kind == "huggingface":
        return _HUGGINGFACE
    return _OPENAI if cfg.patch else replace(_OPENAI, whole=_OPENAI.whole | _resnet(cfg.vision_layers))


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
        return open_tensors(weights), open_clip_config(read_json(folder / OPEN_CLIP_CONFIG)), "openai"
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

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    vocab, text_width = state["token_embedding.weight"].shape
    if "visual.proj" in state:
        width, _, _, patch = state["visual.conv1.weight"].shape
        layers, heads = (count("visual.transformer.resblocks."),), width // 64
        size = patch * math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    else:
        width, patch = state["visual.layer1.0.conv1.weight"].shape[0], 0
        layers, heads = tuple(count(f"visual.layer{stage}.") for stage in range(1, 5)), width // 2
        size = 32 * math.isqrt(state["visual.attnpool.positional_embedding"].shape[0])
    image = {"vision_layers": layers, "vision_width": width, "vision_heads": heads, "patch": patch, "image_size": size}
    text = {"text_layers": count("transformer.resblocks."), "text_width": text_width, "text_heads": text_width // 64}
    return Clip(
        **image, **text, embed=state["text_projection"].shape[1], vocab=vocab, context=state["positional_embedding"].shape[0]
    )


def open_clip_config(values: Mapping[str, Any]) -> Clip:
    """The model of an open_clip_config.json. UserError lists every setting that is not supported."""
    whole = Settings(values, OPEN_CLIP_CONFIG)
    read, see = whole.inside("model_cfg"), whole.inside("preprocess_cfg")
    image, text = read.inside("vision_cfg"), read.inside("text_cfg")
    width, size, layers = image.size("width"), image.size("image_size"), image.get("layers")
    convolutional = isinstance(layers, list)
    if convolutional:
        stages = Settings({f"layers[{n}]": count for n, count in enumerate(layers)}, problems=whole.problems)
        counts, patch = tuple(stages.size(name, most=MOST_LAYERS) for name in stages.values), 0
        image.fixed("patch_size")
    else:
        counts, patch = (image.size("layers", most=MOST_LAYERS),), image.size("patch_size")
    # A ResNet's attention pool is 32 times as wide as its first stage.
    heads = width * (32 if convolutional else 1) // image.size("head_width", 64)
    vision = {"vision_layers": counts, "vision_width": width, "vision_heads": heads, "patch": patch, "image_size": size}
    language = {"text_layers": text.size("layers", most=MOST_LAYERS), "text_width": text.size("width")}
    language |= {"text_heads": text.size("heads"), "context": text.size("context_length"), "vocab": text.size("vocab_size")}
    kinds = {"activation": "quick_gelu" if read.flag("quick_gelu", False) else "gelu", "embed": read.size("embed_dim")}
    kinds["loss"] = "sigmoid" if read.get("init_logit_bias") is not None else "softmax"
    read.get("init_logit_scale")
    for name, value in {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}.items():
        see.fixed(name, value)
    see.fixed("size", size, [size, size])
    see.get("fill_color")  # nothing is filled if the short side fits
    kinds |= {"pixel_mean": _channels(see, "mean", PIXEL_MEAN), "pixel_std": _channels(see, "std", PIXEL_STD)}
    for part in (read, image, text, see):
        part.refuse_rest(neutral=False)
    return read.build(Clip, **vision, **language, **kinds)


def _channels(read: Settings, name: str, usual: tuple[float, ...]) -> tuple[float, ...] | None:
    """A number for each channel; None for OpenAI's usual numbers."""
    found = read.get(name)
    three = isinstance(found, list) and len(found) == 3
    if found is not None and not (three and all(isinstance(x, int | float) and math.isfinite(x) for x in found)):
        return read.refuse(name, found, "a number for each of three channels is needed")
    numbers = None if found is None else tuple(map(float, found))
    return None if numbers == usual else numbers


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
    """The model with the normalisation of a preprocessor_config.json. UserError lists every other preprocessing."""
    read, size = Settings(values, "preprocessor_config.json"), cfg.image_size
    # The supported values of each setting, as files write it; 3 is bicubic. Null turns most of them off.
    known = {name: (True,) for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    known |= {"size": (size, {"shortest_edge": size}), "crop_size": (size, {"height": size, "width": size}), "resample": (3,)}
    for name, ways in (known | {"do_convert_rgb": (True, None), "do_pad": (False, None)}).items():
        read.get(name)
        if values.get(name, ways[0]) not in ways:
            read.refuse(name, values[name], f"only {ways[0]!r} is supported here")
    if not math.isclose(read.number("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        read.refuse("rescale_factor", values["rescale_factor"], "only 1/255 is supported here")
    mean, std = _channels(read, "image_mean", PIXEL_MEAN), _channels(read, "image_std", PIXEL_STD)
    read.check_rest(_NOT_OF_PIXELS)
    return read.build(lambda: replace(cfg, pixel_mean=mean, pixel_std=std))


# Settings of a preprocessor_config.json that change no pixel.
_NOT_OF_PIXELS = """
    image_processor_type feature_extractor_type processor_class data_format input_data_format device return_tensors
""".split()
# Settings of a config.json that change no feature of a CLIP.
_HARMLESS = ("dropout", "initializer_factor", "logit_scale_init_value", "projection_dim", "tie_word_embeddings")
# Hugging Face leaves out settings that equal these defaults.
_COMMON = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TEXT = _COMMON | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 77}
_TEXT |= {"vocab_size": 49_408, "bos_token_id": 49_406, "eos_token_id": 49_407, "pad_token_id": 1}
_VISION = _COMMON | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224}
_VISION |= {"patch_size": 32, "num_channels": 3}


def _tower(read: Settings, name: str, defaults: dict[str, Any]) -> Settings:
    """A tower's settings. An older `NAME_dict` and its defaults override NAME, as in the transformers library."""
    own, older = read.inside(name).values, read.inside(f"{name}_dict").values
    values = defaults | own | ({} if read.get(f"{name}_dict") is None else defaults | older)
    return Settings(values, read.where, f"{name}.", read.problems)


def huggingface_config(values: Mapping[str, Any]) -> Clip:
    """The model of a config.json. UserError lists every setting that is not supported."""
    read = Settings(values)
    text, image = _tower(read, "text_config", _TEXT), _tower(read, "vision_config", _VISION)
    activation = text.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu"))
    fields = {"embed": read.size("projection_dim", 512), "activation": activation}
    for name, part in {"text": text, "vision": image}.items():
        width, layers = part.size("hidden_size"), part.size("num_hidden_layers", most=MOST_LAYERS)
        fields |= {f"{name}_width": width, f"{name}_heads": part.size("num_attention_heads")}
        fields[f"{name}_layers"] = layers if name == "text" else (layers,)
        for setting, value in {"intermediate_size": 4 * width, "layer_norm_eps": 1e-5, "hidden_act": activation}.items():
            part.fixed(setting, value)
    image.fixed("num_channels", 3)
    fields |= {"patch": image.size("patch_size"), "image_size": image.size("image_size")}
    fields |= {"context": text.size("max_position_embeddings"), "vocab": text.size("vocab_size")}
    # The features of a text are those of its end token: the largest id if the setting is 2 (an older default), else that id.
    text.fixed("eos_token_id", fields["vocab"] - 1, 2, 49_407)
    for part in (read, text, image):
        part.check_rest(_HARMLESS)
    return read.build(Clip, **fields)
