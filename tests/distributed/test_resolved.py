"""The sharding of every parameter of the papers' models on a mesh, compared with tests/goldens/shardings.json.

To accept a change of the rules: METAJAX_WRITE_GOLDENS=1 python -m pytest tests/distributed/test_resolved.py; then read the diff.
"""

import json
import os
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from metajax import registry
from metajax.distributed.rules import partition_spec
from metajax.models.lm import named_params
from metajax.training.program import abstract_model

GOLDEN = Path(__file__).parents[1] / "goldens" / "shardings.json"
VOCABULARIES = {"learned_meta_tokens/pretrain/meta_rope": 50_304, "hymba/1.5b": 32_001, "metadata/positions/prepend_url": 50_304}
# 4 divides the heads of all but Hymba, which has 5 of keys.
MESHES = {
    name: ({"data": 2, "fsdp": 16}, {"fsdp": 8, "context": 2, "tensor": 5 if "hymba" in name else 4}) for name in VOCABULARIES
}


def resolved(name, mesh):
    """{parameter: its shape, and after each dimension the mesh axes that it is spread over}."""
    model = abstract_model(registry.find_experiment(name).build("paper"), VOCABULARIES[name])
    lines = {}
    for path, param in named_params(model).items():
        spec = partition_spec(param.get_metadata()["axes"], param.shape, AbstractMesh(tuple(mesh.values()), tuple(mesh)))
        over = (f"/{axes if isinstance(axes, str) else '*'.join(axes)}" if axes else "" for axes in spec)
        lines[path] = " x ".join(f"{size}{axes}" for size, axes in zip(param.shape, over, strict=True))
    return lines


@pytest.mark.parametrize("name", VOCABULARIES)
def test_shardings_equal_the_golden(name):
    registry.load()
    found = {",".join(f"{axis}={size}" for axis, size in mesh.items()): resolved(name, mesh) for mesh in MESHES[name]}
    if os.environ.get("METAJAX_WRITE_GOLDENS"):
        before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(before | {name: found}, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())[name]
