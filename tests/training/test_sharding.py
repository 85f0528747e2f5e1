"""The same loss on 1 device and on 8 virtual ones, for every mesh shape; the table of rules and its refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from metajax.core.errors import UserError
from metajax.distributed.mesh import HostRows, auto_meshes, make_mesh, parse_mesh
from metajax.distributed.rules import param_shardings, partition_spec
from metajax.training.program import check_axes

ROOT = Path(__file__).parents[2]
MESH = AbstractMesh((2, 4), ("data", "fsdp"))

PROGRAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
import jax
import numpy as np
from metajax.config import Config
from metajax.core.fields import from_dict
from metajax.data.pipeline import Paths, open_corpora, training_batches
from metajax.training.checkpoints import Checkpoints, read_parameters
from metajax.training.program import Program
from metajax.training.state import to_arrays

config = from_dict(Config, json.loads(sys.argv[1]))
corpora = open_corpora(config, Paths(cache=Path(sys.argv[2])))
batches = training_batches(corpora)
results = {}
for mesh in ("data=1,fsdp=1", *sys.argv[4:]):
    devices = jax.devices()[:1] if mesh == "data=1,fsdp=1" else jax.devices()
    program = Program.build(replace(config, runtime=replace(config.runtime, mesh=mesh)), corpora.tokenizer.vocabulary.size, devices)
    state = program.create_state()
    arrays = to_arrays(state.model)
    if not results:
        first, folder = jax.device_get(arrays), Path(sys.argv[3])
        parent = Checkpoints(folder, keep=2)
        parent.save(state, {})
        parent.close()
    read = to_arrays(read_parameters(folder, program.abstract_state().model))
    moved = all(read[p].sharding == a.sharding and np.array_equal(read[p], first[p]) for p, a in arrays.items())
    local = sum(a.addressable_shards[0].data.nbytes for a in arrays.values()) / sum(a.nbytes for a in arrays.values())
    step_fn, losses = program.compile_step(state, program.put(batches[0])), []
    for n in range(3):
        state, metrics = step_fn(state, program.put(batches[n]))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    results[mesh] = {"losses": losses, "local": local, "moved": moved}
print(json.dumps(results))
"""


# Mesh -> the share of the parameters on one device, at least.
SHARES = {
    "data=1,fsdp=8": 1 / 8,
    "data=8,fsdp=1": 1.0,
    "data=2,fsdp=4": 1 / 4,
    "fsdp=4,context=2": 1 / 8,
    "fsdp=2,context=2,tensor=2": 1 / 8,
}
MESHES = tuple(SHARES)


FEW_MESHES = {"plain": MESHES[:2], "meta_tokens": MESHES[-1:], "hybrid": MESHES[-1:]}
ALL_MESHES = [pytest.param(kind, MESHES, marks=pytest.mark.slow) for kind in FEW_MESHES]


@pytest.mark.parametrize(("kind", "meshes"), [*FEW_MESHES.items(), *ALL_MESHES])
def test_eight_devices_equal_one(tiny_config, paths, tmp_path, kind, meshes):
    from metajax.config import Hybrid, MetaTokens
    from metajax.core.fields import to_dict

    changes = {"data.batch_size": 8, "model.width": 32, "meta_tokens": MetaTokens() if kind == "meta_tokens" else None}
    if kind == "hybrid":
        mixers = Hybrid(prefix_tokens=4, kv_groups=(2,), state=4)
        changes |= {"model.hybrid": mixers, "model.layers": 2, "model.window": 8, "runtime.implementation": "reference"}
    config = tiny_config(**changes)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(to_dict(config)), str(paths.cache), str(tmp_path / "parent"), *meshes],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    one = results.pop("data=1,fsdp=1")
    for mesh, result in results.items():
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5, err_msg=mesh)
        assert result["moved"], f"{mesh}: it reads the parameters that one device saved, each where its rules put it"
        assert SHARES[mesh] <= result["local"] < 2 * SHARES[mesh], (
            f"{mesh}: parameters are spread over fsdp, small ones stay whole"
        )
    assert results.keys() == set(meshes) and one["local"] == 1.0


def test_rules_by_hand():
    assert partition_spec(("embed", "mlp"), (32, 64), MESH) == PartitionSpec(("fsdp",), None)
    assert partition_spec(("embed", "mlp"), (3, 32, 64), MESH) == PartitionSpec(None, ("fsdp",), None), (
        "the axis of stacked layers comes first"
    )
    assert partition_spec(("batch", "length", None), (16, 8, 4), MESH) == PartitionSpec(("data", "fsdp"), None, None)
    assert partition_spec(("embed",), (30,), MESH) == PartitionSpec(None), "4 does not divide 30: it stays whole"
    assert partition_spec(("embed", "mlp"), (30, 64), MESH) == PartitionSpec(None, ("fsdp",)), "the next axis takes fsdp"


@pytest.mark.parametrize(
    ("parameters", "rows", "chosen", "rejected"),
    [
        (10**7, 32, "data=16", ["fsdp=16"]),
        (10**8, 32, "fsdp=16", ["data=16"]),
        (10**7, 8, "data=8,context=2", ["fsdp=8,context=2"]),
        (10**9, 1, "context=16", []),
    ],
)
def test_auto_holds_small_states_whole_and_gives_rows_to_the_devices(parameters, rows, chosen, rejected):
    devices = [SimpleNamespace(platform="cpu")] * 16
    first, *others = auto_meshes(parameters, rows, devices, gathers=2, pieces=1, weight_bytes=2)
    assert first.mesh == chosen and [option.mesh for option in others] == rejected
    assert first.state == 16 * parameters / (1 if "data" in chosen and "context" not in chosen else 2 if "data" in chosen else 16)


def test_auto_spreads_a_large_state_within_a_slice():
    devices = [SimpleNamespace(platform="tpu", slice_index=n // 8) for n in range(16)]
    options = auto_meshes(10**9, 32, devices, gathers=1, pieces=4, weight_bytes=2)
    assert [option.mesh for option in options] == ["data=2,fsdp=8", "data=16"]
    assert options[0].links == 2 * 4 * 2e9 * 7 / 8 + 2 * 2e9 / 8 / 2 and options[1].links == 2 * 2e9 * 15 / 16


def test_a_large_parameter_is_never_left_whole_on_every_device():
    large = nnx.Param(jax.ShapeDtypeStruct((1599, 1601), "float32"), axes=("embed", "mlp"))
    with pytest.raises(UserError, match=r"fsdp = .* would be replicated"):
        param_shardings({"w": large}, MESH)


def test_rules_refuse_collisions_and_unknown_axes():
    with pytest.raises(UserError, match="'embed' and 'embed' of one array both map to mesh axis 'fsdp'"):
        partition_spec(("embed", "embed"), (32, 32), MESH)
    with pytest.raises(UserError, match="no sharding rule for the logical axis 'emebd'"):
        partition_spec(("emebd",), (32,), MESH)


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [
        ("data=3,fsdp=2", 8, "3 x 2 = 6, but there are 8 devices"),
        ("data=-1,fsdp=-1", 8, "only one axis"),
        ("dta=2", 8, "did you mean 'data'"),
        ("data=two", 8, "whole number"),
    ],
)
def test_mesh_errors_say_what_is_wrong(text, devices, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text, devices)


def test_slices_are_spread_only_over_data():
    devices = [SimpleNamespace(platform="tpu", slice_index=i // 2, id=i) for i in range(4)]
    with pytest.raises(UserError, match="data=2,fsdp=-1"):
        make_mesh("fsdp=-1", devices)


def test_a_free_mesh_axis_takes_the_remaining_devices():
    assert parse_mesh("data=2,fsdp=-1", 8) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    assert set(parse_mesh("", 1).values()) == {1}


@pytest.mark.parametrize("kind", ["meta_tokens", "hybrid"])
def test_every_parameter_of_the_model_has_rules(kind):
    from metajax.config import MetaTokens, Model, Runtime
    from metajax.models.lm import LM
    from metajax.models.presets import hymba_1_5b

    plain = Model(layers=2, width=16, heads=2, mlp_width=32, bias=True, tied=False, position="learned")
    cfg, meta = (hymba_1_5b(), None) if kind == "hybrid" else (plain, MetaTokens())
    model = jax.eval_shape(lambda: LM(cfg, vocab_size=64, max_length=8, meta=meta, runtime=Runtime(), key=jax.random.key(0)))
    param_shardings(model, MESH)  # refuses a large parameter that it would leave whole
    params = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert len(params) > 20
    for param in params:
        assert len(partition_spec(param.get_metadata()["axes"], param.shape, MESH)) == len(param.shape)


class Chip:
    """A device of a process, for meshes that only say where things lie."""

    platform, device_kind = "cpu", "chip"

    def __init__(self, number, process):
        self.id, self.process_index = number, process


def rows_of(processes, shape, process):
    chips = np.array([Chip(i, p) for i, p in enumerate(processes)], object).reshape(*shape, 1)
    return HostRows.of(Mesh(chips, ("data", "fsdp", "context", "tensor")), process)


def test_processes_that_hold_the_same_rows_read_the_same_slice():
    assert [rows_of([0, 0, 1, 1], (1, 4, 1), p) for p in (0, 1)] == [(0, 2, True), (1, 2, True)]
    assert [rows_of([0, 0, 1, 1], (1, 2, 2), p) for p in (0, 1)] == [(0, 2, True), (1, 2, True)], "context inside each process"
    assert [rows_of([0, 1, 0, 1], (1, 2, 2), p) for p in (0, 1)] == [(0, 1, True), (0, 1, False)], (
        "both processes read all rows and one counts them"
    )
    assert [rows_of([0, 1, 2, 3], (2, 1, 2), p) for p in range(4)] == [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]
    with pytest.raises(UserError, match="spreads the rows unevenly over processes"):
        rows_of([0, 1, 1, 1], (1, 2, 2), 0)


def test_rows_and_heads_that_an_axis_does_not_divide_are_refused(tiny_config):
    sizes = lambda **axes: SimpleNamespace(shape={"context": 1, "tensor": 1} | axes)  # noqa: E731
    check_axes(tiny_config(), sizes(context=2, tensor=2))
    with pytest.raises(UserError, match=r"the 32 positions of a row do not divide by context = 3; choose a divisor of 32"):
        check_axes(tiny_config(), sizes(context=3))
    with pytest.raises(UserError, match=r"the 2 heads \(model.heads\) do not divide by tensor = 4"):
        check_axes(tiny_config(), sizes(tensor=4))
