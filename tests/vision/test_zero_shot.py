"""Zero-shot classification compared with CoOp's code: texts, class vectors and logits, for one template and an ensemble."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.core.errors import UserError
from metajax.vision.clip.model import cut_after_end
from metajax.vision.contrastive import class_weights
from metajax.vision.data.templates import TEMPLATES, ensemble, texts_of

Z = np.load(Path(__file__).parents[1] / "goldens" / "prompt_clip_a.npz")
NAMES = json.loads(str(Z["classnames_json"]))


@pytest.mark.parametrize("kind", ["zeroshot", "ensemble"])
def test_meets_the_golden(prompt_clip, kind):
    tokens = Z[f"{kind}_tokenized"].reshape(-1, len(NAMES), 77)
    weights = class_weights(prompt_clip, jnp.asarray(cut_after_end(tokens)))
    np.testing.assert_allclose(weights, Z[f"{kind}_text_features"], rtol=0, atol=2e-5)
    images = jnp.asarray(Z["images"].transpose(0, 2, 3, 1))
    logits = jax.jit(lambda model: model.logits(model.encode_image(images), weights))(prompt_clip)
    np.testing.assert_allclose(logits, Z[f"{kind}_logits"], rtol=0, atol=2e-5)
    assert np.argmax(logits, axis=1).tolist() == np.argmax(Z[f"{kind}_logits"], axis=1).tolist()


def test_texts(clip_tokenizer):
    assert str(Z["zeroshot_template"]) == TEMPLATES["oxford_pets"]
    assert list(ensemble("oxford_pets")) == json.loads(str(Z["ensemble_templates_json"]))
    assert len(ensemble("imagenet")) == 7
    assert len(ensemble("imagenet_r")) == 8
    assert ensemble("folder:mine", "my {}")[-1] == "my {}"
    for templates, rows in (
        ((TEMPLATES["oxford_pets"],), Z["zeroshot_tokenized"][None]),
        (ensemble("oxford_pets"), Z["ensemble_tokenized"]),
    ):
        for template, wanted in zip(templates, rows, strict=True):
            np.testing.assert_array_equal(clip_tokenizer.tokenize(texts_of(NAMES, template)), wanted)
    with pytest.raises(UserError, match=r"has no \{\}"):
        texts_of(NAMES, "a photo")
    with pytest.raises(UserError, match="no template for data set 'pets'"):
        ensemble("pets")
