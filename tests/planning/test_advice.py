"""Advice if a plan does not fit, without a compiler; the page of a plan."""

import re

import pytest

from metajax.planning.advice import advise, candidates, largest_batch
from metajax.planning.buffers import kind_of, largest_buffers, temporaries
from metajax.reporting.plan_page import write_plan_page
from metajax.vision.clip.config import preset
from metajax.vision.config import ImageConfig, Prompts

ASSIGNMENT = """BufferAssignment:
allocation 0: size 7203840000, parameter 0, shape |bf16[60000,60000]| at ShapeIndex {}:
 value: <44 x.1 @0> (size=7203840000,offset=0): bf16[60000,60000]{1,0:T(8,128)(2,1)}
allocation 1: size 90000000, output shape is |f32[9]|, maybe-live-out:
 value: <50 fusion.9 @0> (size=90000000,offset=0): f32[9]{0}
allocation 2: size 30000, preallocated-temp:
 value: <45 fusion.2 @0> (size=10000,offset=0): bf16[50,100]{1,0:T(8,128)(2,1)}
 value: <46 sort.6{1} @0> (size=20000,offset=512): s32[50,100]{1,0:T(8,128)}
 value: <47 iota.3 @0> (size=15000,offset=512): s32[50,75]{1,0}
 value: <48 in_vmem @6> (size=99999,offset=0): pred[]{:T(512)S(6)}
 value: <49 small @0> (size=8,offset=25000): f32[2]{0}
"""
RANGES = """HloLiveRange (max 30):
  BufferLiveRange:
    x.1{}:0-30
    fusion.2{}:1-10
    sort.6{1}:11-20
    iota.3{}:15-25
    small{}:2-28
    in_vmem{}:15-20
"""
PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/models/lm.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=5 end_column=27}
2 {file_name_id=1 function_name_id=1 line=73 end_line=73 column=6 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

ENTRY %main {
  %fusion.2 = bf16[50,100]{1,0} fusion(%x.1), kind=kOutput
  %sort.6 = (bf16[50,100], s32[50,100]) sort(%a, %b), metadata={op_name="jit(step)/transpose(jvp())/sort" stack_frame_id=2}
  %iota.3 = s32[50,75]{1,0} iota(), metadata={op_name="jit(step)/jvp()/iota"}
}
"""


@pytest.fixture
def dump(tmp_path):
    """A folder as the compiler leaves it, cut down."""
    (tmp_path / "module_0000.jit_step.cl_1.after_optimizations-buffer-assignment.txt").write_text(ASSIGNMENT)
    (tmp_path / "module_0000.jit_step.cl_1.after_optimizations.txt").write_text(PROGRAM)
    return tmp_path


def test_the_largest_buffers_are_read_from_the_dump(dump, tmp_path_factory):
    first, second, third = largest_buffers(dump)
    assert first == {
        "bytes": 20000,
        "shape": "s32[50,100]{1,0:T(8,128)}",
        "name": "sort.6",
        "operation": "jit(step)/transpose(jvp())/sort",
        "source": "/x/models/lm.py:73",
    }
    assert (second["bytes"], second["name"], second["source"]) == (10000, "fusion.2", None)
    assert third["bytes"] == 8, "arguments, results, other memories and shared buffers are left out"
    assert largest_buffers(tmp_path_factory.mktemp("empty")) == [] and temporaries(tmp_path_factory.mktemp("none")) == {}


def test_memory_at_the_peak_is_split_by_kind(dump):
    """`fusion.2` is freed when `sort.6` and `iota.3` are alive. Buffers of another memory or without a range are left out."""
    (dump / "module_0000.jit_step.cl_1.after_optimizations-live-range.txt").write_text(RANGES)
    assert temporaries(dump) == {"activations": 15000, "gradients": 20000, "other": 8}


def test_recomputed_buffers_are_no_gradients():
    assert kind_of("jit(step)/transpose(jvp())/checkpoint/rematted_computation/dot_general") == "activations"
    assert kind_of("jit(step)/transpose(jvp())/checkpoint/dot_general") == "gradients" and kind_of("jit(step)/mul") == "other"


def test_the_first_change_that_fits_is_advised(tiny_config):
    config = tiny_config(**{"data.batch_size": 16})
    assert list(candidates(config, shards=4)) == [
        {"runtime.remat": "dots"},
        {"runtime.remat": "full"},
        {"runtime.remat": "full", "training.accumulation_steps": 2},
        {"runtime.remat": "full", "training.accumulation_steps": 4},
    ]
    tried = []

    def plan(changed):
        tried.append(changed)
        return {"fits": changed.training.accumulation_steps == 2, "memory": {"total": 7}}

    assert advise(config, 4, plan) == {"changes": {"runtime.remat": "full", "training.accumulation_steps": 2}, "total": 7}
    assert len(tried) == 3
    assert advise(config, 4, lambda changed: {"fits": False}) is None


def test_a_prompt_learner_may_accumulate_and_a_clip_may_not():
    learner = ImageConfig(name="x", weights="clip", prompts=Prompts(batch=8))
    assert {"runtime.remat": "full", "training.accumulation_steps": 2} in list(candidates(learner, 4))
    clip = ImageConfig(name="x", clip=preset("ViT-B/32"))
    assert list(candidates(clip, 1)) == [{"runtime.remat": "dots"}, {"runtime.remat": "full"}]
    assert (learner.batch, clip.batch) == (("prompts.batch", 8, 1), ("images.batch", 96, 1))


def test_the_largest_batch_is_found_by_bisection():
    for most in (0, 3, 4, 36, 100, 1000):
        tried = []

        def fits(rows, most=most, tried=tried):
            tried.append(rows)
            return rows <= most

        assert largest_batch(4, 32, fits) == most // 4 * 4
        assert len(tried) == len(set(tried)) and len(tried) < 14


def test_the_page_of_a_plan(tmp_path, dump):
    gib = 2**30
    plan = {"name": "x", "scale": "paper", "topology": "v5e:2x2", "chips": 4, "mesh": {"data": 1, "fsdp": 4}, "flops": 1e12}
    plan |= {"fits": True, "compile_seconds": 3.0, "largest_buffers": [], "reads": {"count": 8192, "unit": "tokens"}}
    plan |= {"products": 4e12, "hbm_bytes": 5_000_000_000}
    plan |= {"kernels": {"causal_conv_forward": 24}, "flops_by_part": {"mlp": 3e7, "head": 1e7}}
    plan |= {"state": {"parameters": gib, "optimizer": gib, "frozen": gib}}
    plan["memory"] = {
        "arguments": 4 * gib,
        "outputs": 0,
        "temporaries": 8 * gib,
        "program": gib,
        "total": 13 * gib,
        "limit": 16 * gib,
    }
    plan["collectives"] = {"all-gather": {"count": 3, "bytes": 5e6, "seconds": 1e-3}}
    plan["temporaries"] = {"activations": 5 * gib, "gradients": 2 * gib, "other": gib // 2}
    plan["bound"] = {"operations": 0.1, "kernels": 0.2, "state": 0.003, "links": 0.01, "network": 0.0, "step": 0.2, "mfu": 0.5}
    plan["estimate"] = {"kernels": 0.15, "xla": 0.5, "step": 0.65, "mfu": 0.154}
    write_plan_page(tmp_path / "plan.html", plan)
    page = (tmp_path / "plan.html").read_text()
    assert "13.000 GiB" in page and "of 16 GiB" in page and "3 times, 5.0 MB" in page
    assert 'p1" style="width: 6.25%"' in page and "activations</dt>" in page and "24 calls" in page and "75.0%" in page
    kinds = re.findall(r'<i class="(p\d)"></i>', page)
    assert len(set(kinds)) == len(kinds) == 9 and all(f".{kind} {{" in page for kind in kinds), (
        "each kind of memory has a colour of its own"
    )
    assert "4 chips, fsdp 4" in page
    assert "as scheduled, all else at the peak" not in page, "schedules were not requested"
    call = {"name": "causal_conv_forward", "operands": ["s32[1]", "bf16[2, 256, 640]"]}
    call |= {"times": 24, "cycles": 8000, "seconds": 0.15}
    write_plan_page(tmp_path / "plan.html", plan | {"schedules": [call]})
    page = (tmp_path / "plan.html").read_text()
    assert (
        "causal_conv_forward of bf16[2, 256, 640]" in page and "24 calls of 8,000 cycles, 150.00 ms" in page and "15.4%" in page
    )
    broken = {
        "fits": False,
        "reason": "RESOURCE_EXHAUSTED",
        "largest_buffers": largest_buffers(dump),
        "largest_batch": {"field": "data.batch_size", "size": 8},
    }
    broken["advice"] = {"changes": {"runtime.remat": "full"}, "total": 13 * gib}
    write_plan_page(tmp_path / "plan.html", plan | broken)
    page = (tmp_path / "plan.html").read_text()
    for text in ("s32[50,100]", "/x/models/lm.py:73", "--set runtime.remat=full: 13.00 GiB", "data.batch_size=8"):
        assert text in page
