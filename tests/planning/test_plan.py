"""Plans for absent TPU slices."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jsonschema
import pytest

from metajax.core.errors import UserError
from metajax.planning.plan import memory, text_step, whole_batch
from metajax.planning.topology import chip_of, parse_topology
from metajax.training.program import Program

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "plan.schema.json").read_text())

HLO = """HloModule jit_step

%fused.1 (p: bf16[4,128]) -> bf16[8,128] {
  ROOT %ag.1 = bf16[8,128]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}
}

%fused.2 (p: bf16[4,128]) -> bf16[8,128] {
  ROOT %ag.2 = bf16[8,128]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = bf16[8,128]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %ag-done = bf16[8,128]{1,0} fusion(%ag), kind=kCustom, calls=%fused.2
  %passed = (bf16[16,128]{1,0}, bf16[16,128]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %causal_conv_forward.3 = bf16[2,256,640]{2,1,0} custom-call(%words, %rows), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[2,1,1,16]{3,2,1,0}, bf16[2,256,640]{2,1,0}}, frontend_attributes={}
  %constant.3 = s32[]{:T(128)} constant(1)
  %get-tuple-element.4 = s32[] get-tuple-element(%p), index=0
  %add.5 = s32[] add(%get-tuple-element.4, %constant.3)
  ROOT %tuple.6 = (s32[], f32[8]) tuple(%add.5, %ag)
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(3)
  %get-tuple-element.7 = s32[] get-tuple-element(%p), index=0
}

%called.1 (p: f32[100]) -> f32[25] {
  ROOT %rs = f32[25]{0} reduce-scatter(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.2 (input: f32[100]) -> f32[25] {
  %all-reduce.3 = f32[100]{0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}
}

ENTRY %main.5 (a: f32[8]) -> f32[8] {
  %ar = (f32[60]{0}, f32[40]{0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  %scattered = f32[25]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2, backend_config={}
  %offloaded = ((f32[100]{0}), f32[25]{0}, u32[]{:S(8)}) call-start(%a), async_execution_thread="sparsecore", to_apply=%called.1
  %send = (f32[25]{0}, u32[], token[]) send(%scattered, %after), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), is_host_transfer=true
  %while.1 = (s32[], f32[8]) while(%tuple.1), condition=%condition.1, body=%body.1
}
"""


def test_collectives_count_once_for_each_trip():
    """In the program, in a fusion, in several fusions that share one operation, and in a call on another thread."""
    from metajax.planning.plan import collectives

    found = collectives(HLO, chip_of("v5e:2x4"))
    assert found.pop("all-gather") == {"count": 3, "bytes": 3 * 2048, "seconds": pytest.approx(3 * 2048 / 2 / 200e9)}
    assert found.pop("all-reduce") == {"count": 1, "bytes": 400, "seconds": pytest.approx(2 * 400 * 7 / 8 / 200e9)}
    assert found.pop("reduce-scatter") == {"count": 2, "bytes": 800, "seconds": pytest.approx(800 * 3 / 4 / 200e9)}
    assert found.pop("collective-permute") == {"count": 3, "bytes": 3 * 4096, "seconds": pytest.approx(3 * 4096 / 200e9)}
    assert found.pop("all-reduce between slices") == {"count": 1, "bytes": 100, "seconds": pytest.approx(100 / 3.125e9)}
    assert not found


def test_kernels_count_once_for_each_trip():
    from metajax.planning.schedules import Call, kernel_calls

    operands = (("s32", (2, 1, 1, 16)), ("bf16", (2, 256, 640)))
    assert kernel_calls(HLO) == {Call("causal_conv_forward", operands): 3}


def test_no_bound_exceeds_the_possible_time():
    """The kernels' cycles count in addition to the other operations at the peak; XLA's estimate is shown but is no bound."""
    from metajax.planning.plan import bounds

    chip = chip_of("v5e:2x2")
    found = {
        "chips": 4,
        "flops": 4 * 1970e9,
        "flops_by_part": {"mlp": 500e9, "attention_pairs": 1470e9},
        "reads": {"count": 4, "unit": "tokens"},
        "state": {"parameters": 819_000_000, "optimizer": 0},
        "xla_cycles": 15e9,
        "schedules": [{"seconds": 0.3}],
        "collectives": {"all-gather": {"seconds": 0.01}, "all-reduce between slices": {"seconds": 0.02}},
    }
    bound = bounds(found, chip)["bound"]
    assert bound == {
        "operations": pytest.approx(0.01),
        "kernels": pytest.approx(0.3 + 0.0025380711),
        "state": pytest.approx(0.002),
        "links": 0.01,
        "network": 0.02,
        "step": bound["kernels"],
        "mfu": pytest.approx(0.01 / bound["kernels"]),
    }
    estimate = bounds(found, chip)["estimate"]
    assert estimate == {"kernels": 0.3, "xla": 10.0, "step": 10.3, "mfu": pytest.approx(0.01 / 10.3)}


def test_topologies_of_several_slices_and_cores():
    assert parse_topology("v5e:4x4") == (1, "v5e", "4x4") and parse_topology("16xtpu7x:2x2x1") == (16, "tpu7x", "2x2x1")
    assert chip_of("2xv5p:2x2x2") == chip_of("v5p:2x2x2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v6:2x2", "unknown kind 'v6'; did you mean 'v6e'"),
        ("v5e", "expected KIND:SIZE"),
        ("v5e:2by2", "expected KIND:SIZE"),
        ("0xv5e:2x2", "2xv5e:4x4 for two slices"),
    ],
)
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message):
        chip_of(name)


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: the TPU compiler is not here")


def plan(*words):
    """The output of `plan` in a separate process."""
    command = [sys.executable, "run.py", "plan", *words, "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    return found


def test_a_plan_needs_its_memory():
    broken = {"fits": True, "name": "a", "chips": 0}
    problems = {error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(broken)}
    assert {"'memory' is a required property", "'mesh' is a required property", "0 is less than the minimum of 1"} <= problems


def test_memory_agrees_with_the_step_that_runs(tiny_config):
    """On a CPU, whose arrays are not padded: the planned arguments have the bytes of a real state and batch, and the program runs on them."""
    config, device = tiny_config(), jax.devices()[:1]
    planned = text_step(config, device, vocab_size=272)
    program = Program.build(config, 272, device)
    compiled = planned.program.compile_step(planned.program.abstract_state(), planned.batch)
    state, batch = program.create_state(), program.put(whole_batch(config))
    sizes = {part: sum(x.nbytes for x in jax.tree.leaves(tree)) for part, tree in {"state": state, "batch": batch}.items()}
    found = memory(compiled.compiled, chip_of("v5e:1x1"))
    assert found["arguments"] == sum(sizes.values()) - batch["asks_metadata"].nbytes, "which evaluation alone reads"
    assert found["outputs"] < sizes["batch"] < sizes["state"], "the state comes back in the place of the old one"
    assert found["temporaries"] > 0
    state, metrics = compiled(state, batch)
    assert bool(metrics["kept"]) and int(state.step) == 1


@pytest.mark.libtpu
@needs_compiler
def test_the_products_of_the_program_are_the_counted_flops():
    """To the last digit, with loops multiplied by their trips: nothing is computed twice, and no trip is counted twice."""
    changes = ("model.position=learned", "model.layers=4", "runtime.unroll=2", "runtime.remat=none", "runtime.mesh=fsdp=-1")
    changes += ("data.tokenizer=byte", "data.sequence_length=512", "model.max_positions=0")
    words = [word for change in changes for word in ("--set", change)]
    found = plan("learned_meta_tokens/pretrain/plain_rope", "--topology", "v5e:2x2", *words)
    counted = sum(flops for part, flops in found["flops_by_part"].items() if part != "attention_pairs")
    assert found["products"] * found["chips"] == counted * found["reads"]["count"]
    assert [option["mesh"] for option in found["meshes"]] == []


@pytest.mark.libtpu
@needs_compiler
def test_a_tiny_step_is_planned():
    found = plan(
        "learned_meta_tokens/pretrain/meta_rope",
        "--topology",
        "v5e:2x2",
        "--set",
        "data.tokenizer=byte",
        "--set",
        "model.layers=1",
        "--set",
        "data.sequence_length=512",
        "--set",
        "model.max_positions=0",
        "--set",
        "runtime.unroll=1",
        "--set",
        "runtime.mesh=fsdp=-1",
        "--schedules",
    )
    assert found["fits"] and found["chips"] == 4 and found["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    assert found["kernels"].keys() == {"prefix_window_attention_backward", "prefix_window_attention_forward"}
    memory = found["memory"]
    assert found["state"]["parameters"] + found["state"]["optimizer"] < memory["arguments"] < memory["total"] < memory["limit"]
    assert found["temporaries"].keys() == {
        "activations",
        "gradients",
        "other",
    }  # all but nothing: a step this small stays off the HBM
    bound, estimate = found["bound"], found["estimate"]
    assert 0 < bound["operations"] <= bound["step"] and 0 < bound["mfu"] <= 1
    assert {kernel["name"] for kernel in found["schedules"]} == found["kernels"].keys()
    assert 0 < estimate["kernels"] < bound["kernels"] <= bound["step"] < estimate["step"]
    assert found["collectives"]["all-gather"]["bytes"] > 0


@pytest.mark.libtpu
@needs_compiler
def test_a_step_on_images_is_planned_by_the_same_code():
    found = plan(
        "prompt_learning/base_to_new/aapl/digits",
        "--topology",
        "v5e:2x2",
        "--set",
        "prompts.batch=4",
        "--set",
        "prompts.augmentations=crop,grayscale",
    )
    assert (
        found["fits"]
        and found["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
        and found["reads"] == {"count": 4, "unit": "images"}
    )
    state, memory = found["state"], found["memory"]
    assert 4 * 2384 == state["parameters"] < state["frozen"] and sum(state.values()) < memory["arguments"] < memory["limit"]
    assert found["collectives"]["all-reduce"]["bytes"] > 0, "gradients of sharded images are summed"


@pytest.mark.slow
@pytest.mark.libtpu
@needs_compiler
def test_the_papers_step_of_aapl_fits_on_one_host():
    found = plan(
        "prompt_learning/cross_dataset/aapl/imagenet", "--scale", "paper", "--topology", "v5e:2x4", "--set", "runtime.unroll=1"
    )
    assert found["fits"] and found["chips"] == 8 and found["state"]["parameters"] == 4 * 35_360
    assert found["memory"]["total"] < 4 * 2**30


@pytest.mark.slow
@pytest.mark.libtpu
@needs_compiler
@pytest.mark.parametrize("name", ["hymba/1.5b", "hymba/1.5b_8k"])
def test_the_papers_step_of_hymba_fits_on_eight_chips(name):
    found = plan(name, "--scale", "paper", "--topology", "v5p:2x2x2", "--vocabulary", "32001")
    assert found["fits"] and found["state"]["count"] == 1_522_797_824
    assert found["temporaries"]["activations"] > 0 < found["temporaries"]["gradients"]
    assert {kernel.rpartition("_backward")[0] or kernel for kernel in found["kernels"]} >= {
        "prefix_window_attention",
        "selective_scan",
    }
