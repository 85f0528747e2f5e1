"""CLIP's published folders: names and shapes of the real sizes, round trips of weights, the three layouts, named refusals."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from metajax.config import Runtime
from metajax.core.errors import UserError
from metajax.interop.layouts import values_of
from metajax.models.lm import named_params
from metajax.vision.clip.config import preset
from metajax.vision.clip.model import CLIP, unit
from metajax.vision.data.preprocessing import centre, normalise
from metajax.vision.weights import clip_tensors, from_state, layout_of, load_clip, open_clip_config, openai_config

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = {name: np.load(GOLDENS / f"{name}.npz") for name in ("clip_vit_a", "clip_rn_a")}
PUBLISHED = {"clip_vit_b16": "ViT-B/16", "clip_rn50": "RN50"}
MANIFESTS = json.loads((GOLDENS / "clip_manifests.json").read_text())


def state_of(name):
    return {key.removeprefix("sd/"): value for key, value in FILES[name].items() if key.startswith("sd/")}


def equal(a, b):
    return all(np.array_equal(x[...], named_params(b)[name][...]) for name, x in named_params(a).items())


def hugging_face(state):
    """OpenAI's state dict under the names of the transformers library."""
    whole = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text_projection": "text_projection.weight",
        "visual.proj": "visual_projection.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    pieces = {
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "attn.": "self_attn.",
        ".ln_1": ".layer_norm1",
        ".ln_2": ".layer_norm2",
        "c_fc": "fc1",
        "c_proj": "fc2",
    }
    out = {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    for name, value in state.items():
        new = whole.get(name, name)
        if name in ("text_projection", "visual.proj"):
            value = np.ascontiguousarray(value.T)
        if name not in whole:
            for theirs, ours in pieces.items():
                new = new.replace(theirs, ours)
        if "in_proj" in new:
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                out[new.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            out[new] = value
    return out


CONFIG = {
    "model_type": "clip",
    "projection_dim": 24,
    "text_config": {
        "hidden_size": 40,
        "intermediate_size": 160,
        "num_attention_heads": 5,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
        "vocab_size": 100,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 8,
    },
}
OPEN_CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 40, "heads": 5, "layers": 2},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_tensors_have_their_names_and_shapes(name):
    model = jax.eval_shape(lambda: CLIP(preset(PUBLISHED[name]), runtime=Runtime(), key=jax.random.key(0)))
    wanted = {tensor: tuple(shape) for tensor, shape in MANIFESTS[name].items() if not tensor.endswith("num_batches_tracked")}
    assert {tensor: stored.shape for tensor, stored in clip_tensors(model, "openai").items()} == wanted
    state = {tensor: np.broadcast_to(np.float32(0), shape) for tensor, shape in MANIFESTS[name].items()}
    assert openai_config(state) == preset(PUBLISHED[name])


@pytest.mark.parametrize("name", FILES)
def test_import_and_export_restore_weights(name, clip_config):
    state, cfg = state_of(name), clip_config(FILES[name])
    model = from_state(state, cfg, "openai")
    back = dict(values_of(model, clip_tensors(model, "openai"), layout_of(cfg, "openai")))
    kept = {tensor for tensor in state if not tensor.endswith("num_batches_tracked")}
    assert back.keys() == kept and all(np.array_equal(back[tensor], state[tensor]) for tensor in kept)


def test_folders_of_hugging_face_and_open_clip(tmp_path, clip_config):
    state = state_of("clip_vit_a")
    wanted = from_state(state, clip_config(FILES["clip_vit_a"]), "openai")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(hugging_face(state), tmp_path / "model.safetensors")
    found = load_clip(tmp_path)
    assert found.cfg == wanted.cfg and equal(found, wanted)
    # open_clip's file goes first where both are there.
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    halves = {name: value.astype(np.float16) for name, value in state.items()}
    save_file(halves, tmp_path / "open_clip_model.safetensors")
    found = load_clip(tmp_path)
    assert found.cfg == wanted.cfg and equal(found, from_state(halves, wanted.cfg, "openai"))


def test_openai_archives(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch alone writes TorchScript archives")
    changes = {"vision_layers": (1, 2, 1, 1), "vision_width": 8, "vision_heads": 4, "image_size": 64}
    cfg = preset("RN50", text_width=64, text_heads=1, text_layers=1, embed=16, vocab=99, context=9, **changes)
    model = jax.jit(lambda key: CLIP(cfg, runtime=Runtime(), key=key))(jax.random.key(1))
    state = dict(values_of(model, clip_tensors(model, "openai"), layout_of(cfg, "openai")))
    root = torch.nn.Module()
    for name, value in (state | {"input_resolution": np.float32(64)}).items():
        *folders, leaf = name.split(".")
        module = root
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, torch.nn.Module())
            module = getattr(module, folder)
        module.register_buffer(leaf, torch.tensor(np.array(value)).half())
    torch.jit.save(torch.jit.script(root), tmp_path / "RN50.pt")
    found = load_clip(tmp_path / "RN50.pt")
    assert found.cfg == cfg
    assert equal(found, from_state({name: value.astype(np.float16) for name, value in state.items()}, cfg, "openai"))


def test_open_clip_settings():
    cfg = open_clip_config({"model_cfg": OPEN_CLIP | {"quick_gelu": False, "init_logit_bias": -10}})
    assert (cfg.activation, cfg.loss, cfg.vision_heads) == ("gelu", "sigmoid", 4)
    resnet = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    model = {"embed_dim": 1024, "quick_gelu": True, "vision_cfg": resnet, "text_cfg": text}
    assert open_clip_config({"model_cfg": model}) == preset("RN50")
    changed = {"vision_cfg": OPEN_CLIP["vision_cfg"] | {"pool_type": "none", "layers": 2.5}, "custom_text": True}
    with pytest.raises(UserError) as caught:
        open_clip_config({"model_cfg": OPEN_CLIP | changed, "preprocess_cfg": [1]})
    for part in (
        "vision_cfg.pool_type = 'none'",
        "vision_cfg.layers = 2.5",
        "model_cfg.custom_text = True",
        "preprocess_cfg = [1]",
    ):
        assert part in str(caught.value)


PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
}


def hugging_face_folder(folder, config=CONFIG, processor=None):
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(hugging_face(state_of("clip_vit_a")), folder / "model.safetensors")
    return folder


@pytest.mark.fault(7)
def test_pixels_are_normalised_as_the_checkpoint_says(tmp_path, capsys):
    pixels, half = np.full((1, 32, 32, 3), 255, np.uint8), {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    found = load_clip(hugging_face_folder(tmp_path, processor=PROCESSOR | half)).cfg
    np.testing.assert_allclose(normalise(pixels, found), 1.0)
    assert not capsys.readouterr().err
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR | half}))
    assert load_clip(tmp_path).cfg == found
    (tmp_path / "processor_config.json").unlink()
    openai = load_clip(tmp_path).cfg
    assert (
        openai.pixel_mean is None
        and "no preprocessor_config.json: images are normalised with OpenAI's" in capsys.readouterr().err
    )
    np.testing.assert_allclose(normalise(pixels, openai)[0, 0, 0], [1.93033625, 2.07488384, 2.14589777], rtol=1e-6)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}})
    )
    save_file(state_of("clip_vit_a"), tmp_path / "open_clip_model.safetensors")
    assert load_clip(tmp_path).cfg == found


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 2},
        {"size": {"shortest_edge": 36}},
        {"size": {"height": 32, "width": 32}},
        {"do_center_crop": False},
        {"crop_size": 16},
        {"rescale_factor": 1.0},
        {"do_normalize": False},
        {"image_mean": [0.5]},
        {"image_std": "0.5"},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"image_std": [0.5, 0.0, 0.5]},
    ],
    ids=lambda changes: f"{changes}",
)
def test_unsupported_preprocessing_is_refused_by_name(tmp_path, changes):
    (name,) = changes
    with pytest.raises(UserError, match=name.removeprefix("image_")):
        load_clip(hugging_face_folder(tmp_path, processor=PROCESSOR | changes))
    ours = {"image_mean": "mean", "image_std": "std", "resample": "interpolation", "size": "size"}
    if name in ours:
        theirs = {
            "preprocess_cfg": {
                ours[name]: {2: "bilinear"}.get(changes[name], changes[name]) if name == "resample" else changes[name]
            }
        }
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP} | theirs))
        with pytest.raises(UserError, match=r"open_clip_config\.json: preprocess_cfg|pixel_std"):
            load_clip(tmp_path)


@pytest.mark.fault(7)
def test_an_older_config_dict_has_precedence(tmp_path):
    gelu = {tower: CONFIG[tower] | {"hidden_act": "gelu"} for tower in ("text_config", "vision_config")}
    older = {f"{tower}_dict": values for tower, values in gelu.items()}
    assert load_clip(hugging_face_folder(tmp_path, CONFIG | older, PROCESSOR)).cfg.activation == "gelu"
    one = CONFIG | {"text_config_dict": gelu["text_config"]}
    with pytest.raises(UserError, match=r"vision_config\.hidden_act = 'quick_gelu', but only 'gelu'"):
        load_clip(hugging_face_folder(tmp_path, one, PROCESSOR))
    defaults = CONFIG | {"text_config_dict": {"hidden_act": "quick_gelu"}}  # the sizes are the library's then
    with pytest.raises(UserError, match="the checkpoint lacks text_model"):
        load_clip(hugging_face_folder(tmp_path, defaults, PROCESSOR))


@pytest.mark.fault(7)
def test_every_setting_that_is_not_supported_is_named_at_once(tmp_path):
    """Also settings of a tower; other settings of published files are harmless."""
    towers = {
        name: CONFIG[name] | {"dropout": 0.0, "initializer_factor": 1.0, "pruned_heads": {}}
        for name in ("text_config", "vision_config")
    }
    load_clip(
        hugging_face_folder(tmp_path, CONFIG | towers | {"logit_scale_init_value": 2.6592, "text_config_dict": None}, PROCESSOR)
    )
    towers["vision_config"] |= {"num_channels": 4, "qkv_bias": False, "window_size": 7}
    with pytest.raises(UserError) as caught:
        load_clip(hugging_face_folder(tmp_path, CONFIG | towers | {"attention_multiplier": 2.0}, PROCESSOR))
    for part in ("vision_config.num_channels = 4, but only 3", "vision_config.window_size = 7", "attention_multiplier = 2.0"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"crop_size = 16.*resample = 2"):
        load_clip(hugging_face_folder(tmp_path, processor=PROCESSOR | {"resample": 2, "crop_size": 16}))


@pytest.mark.fault(33)
@pytest.mark.parametrize("size", [0, -1, 10**12, "32", None, True, 1.5])
def test_a_size_that_no_clip_has_is_refused(tmp_path, size):
    changed = CONFIG | {"vision_config": CONFIG["vision_config"] | {"num_hidden_layers": size}}
    with pytest.raises(UserError, match=r"config\.json: .*vision_config\.num_hidden_layers"):
        load_clip(hugging_face_folder(tmp_path, changed, PROCESSOR))
    with pytest.raises(UserError, match=r"open_clip_config\.json: .*text_cfg\.width"):
        open_clip_config({"model_cfg": OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | {"width": size}}})


@pytest.mark.peers
@pytest.mark.fault(7)
def test_features_of_images_and_texts_equal_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    transformers = pytest.importorskip("transformers", reason="compares with the transformers library")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    text = CONFIG["text_config"] | {"hidden_act": "gelu", "eos_token_id": 99}
    vision = CONFIG["vision_config"] | {"hidden_act": "gelu"}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    theirs.save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], **size)
    processor.save_pretrained(tmp_path)
    ours = load_clip(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 77, 3), dtype=np.uint8))
    tokens = np.array([[98, 5, 9, 99, 0, 0], [98, 3, 1, 7, 8, 99]])
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(tokens), **processor(image, return_tensors="pt"))
    pixels = jnp.asarray(normalise(centre(image, ours.cfg.image_size), ours.cfg))[None]
    seen, read = unit(ours.encode_image(pixels)), unit(ours.encode_text(jnp.asarray(tokens)))
    np.testing.assert_allclose(seen, wanted.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(read, wanted.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.logits(seen, read), wanted.logits_per_image.numpy(), atol=1e-4)


def test_refusals(tmp_path, monkeypatch, clip_config):
    with pytest.raises(UserError, match=r"config.json: no such file"):
        load_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no open_clip_model\.safetensors and no model\.safetensors"):
        load_clip(tmp_path)
    state, cfg = state_of("clip_vit_a"), clip_config(FILES["clip_vit_a"])
    with pytest.raises(UserError, match=r"lacks visual\.proj"):
        from_state({name: value for name, value in state.items() if name != "visual.proj"}, cfg, "openai")
    with pytest.raises(UserError, match="logit_bias"):
        from_state(state | {"logit_bias": np.float32(0)}, cfg, "openai")
    with pytest.raises(UserError, match="the layout of Hugging Face's CLIP has no place for logit_bias"):
        from_state(hugging_face(state), replace(cfg, loss="sigmoid"), "huggingface")
    with pytest.raises(UserError, match="not OpenAI's CLIP"):
        openai_config({"x": np.zeros(1)})
    (tmp_path / "x.pt").write_bytes(b"")
    monkeypatch.setattr("metajax.vision.weights.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch, or fetch the same weights as safetensors"):
        load_clip(tmp_path / "x.pt")
