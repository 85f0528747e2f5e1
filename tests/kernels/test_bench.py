"""Facts that the bench reads from compiled programs, and its output."""

import importlib.util

import numpy as np
import pytest

from kernels_pallas.bench import compiled, report, scan, splash
from kernels_pallas.bench.hlo import hbm_bytes, product_flops
from kernels_pallas.bench.programs import Kernel, Program, loop, when
from kernels_pallas.bench.schedule import read_schedule, xla_cycles

# A grid whose step (0x4 to 0x19) holds a predicated region of 8 bundles and a loop of 9, a branch and its four delay slots each.
HEAD = "= control target key start\nLB: loop body\n= control target key end\n\n"
BRANCHES = {
    0x2: "LB: > { %x = nop } /* Start region 9 */",
    0x3: "  : > { %1 = sbr.rel (%p1) target = $region1 }",
    0x9: "  : > { %2 = sbr.rel (%p2) target = $region2 }",
    0x16: "PF: > { %3 = nop } /* Start/End empty region 2 */",
    0x18: "LB: >> { %4 = nop } /* Start region 3 */",
    0x1C: "  : > { %5 = sbr.rel (!%p3) target = $region3 }",
    0x21: "PF: > { %6 = nop } /* Start/End empty region 1 */",
    0x22: "  : > { %7 = sbr.rel (!%p4) target = $region9 }",
}
LENGTH = 0x28


def write_dump(folder):
    lines = [f"  {i:#x} {BRANCHES.get(i, '  : > { %y = nop }')}" for i in range(LENGTH)]
    (folder / "1-toy-72-final_bundles.txt").write_text(HEAD + "\n".join(lines) + "\n")
    (folder / "1-toy-71-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:\n")
    slots = "\n".join("1 2" for _ in range(LENGTH))
    header = "== CAPACTIY:\nMXU, VALU\n    4     4\n== UTILIZATION:\n"
    (folder / "1-toy-70-final_hlo-static-per-bundle-utilization.txt").write_text(header + slots + "\n")


def test_bundles_are_counted_by_region_and_visit(tmp_path):
    write_dump(tmp_path)
    schedule = read_schedule(tmp_path, "toy", smallest=4)
    visited = schedule.visited(10, [when(3), loop(40)])
    assert [(r.kind, r.own, n) for r, n in visited] == [
        ("program", 3, 1),
        ("loop", 12, 12),
        ("if", 8, 10),
        ("if", 8, 3),
        ("loop", 9, 40),
    ]
    cost = schedule.cost(10, [when(3), loop(40)])
    assert cost.cycles == 3 + 12 * 12 + 8 * 10 + 8 * 3 + 9 * 40
    assert cost.use == {"MXU": 0.25, "VALU": 0.5}


def test_visits_of_another_program_raise(tmp_path):
    write_dump(tmp_path)
    schedule = read_schedule(tmp_path, "toy", smallest=4)
    with pytest.raises(ValueError, match="toy: 2 regions are declared, but the schedule has if of 8 bundles, loop of 9 bundles"):
        schedule.cost(10, [loop(3), when(40)])
    with pytest.raises(ValueError, match="0 kernels named other"):
        read_schedule(tmp_path, "other")


HLO = """HloModule jit_f

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %constant.3 = s32[]{:T(128)} constant(1)
  %get-tuple-element.4 = s32[] get-tuple-element(%p), index=0
  %add.5 = s32[] add(%get-tuple-element.4, %constant.3), metadata={op_name="jit(f)/add"}
  %fusion.2 = f32[8] fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"70","x":[]}
  ROOT %tuple.6 = (s32[], f32[8]) tuple(%add.5, %fusion.2)
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(32)
  %get-tuple-element.7 = s32[] get-tuple-element(%p), index=0
  ROOT %lt.8 = pred[] compare(%get-tuple-element.7, %constant.9), direction=LT
}

ENTRY %main.5 (a: f32[8]) -> f32[8] {
  %fusion.1 = f32[8] fusion(%a), kind=kLoop, backend_config={"estimated_cycles":"500"}
  %while.1 = (s32[], f32[8]) while(%tuple.1), condition=%condition.1, body=%body.1
}
"""


PRODUCTS = """HloModule jit_f

%sliced (param_0.1: bf16[8,128,256], param_1.1: s32[]) -> bf16[128,256] {
  %param_0.1 = bf16[8,128,256]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %slice.1 = bf16[1,128,256]{2,1,0} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,128,256}
  ROOT %bitcast.1 = bf16[128,256]{1,0} bitcast(%slice.1)
}

ENTRY %main.1 (a: bf16[8,128,256], w: bf16[256,64], i: s32[], x: bf16[16,32,1], k: bf16[8,4,32]) -> f32[128,64] {
  %a = bf16[8,128,256]{2,1,0} parameter(0)
  %w = bf16[256,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %x = bf16[16,32,1]{2,1,0:S(1)} parameter(3)
  %k = bf16[8,4,32]{2,1,0:S(1)} parameter(4)
  %fusion.1 = bf16[128,256]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced
  %copy.1 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} copy(%fusion.1)
  %heads.1 = bf16[16,8,4]{2,1,0:S(1)} convolution(%x, %k), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
  ROOT %convolution.1 = f32[128,64]{1,0} convolution(%copy.1, %w), dim_labels=bf_io->bf
}
"""


def test_products_and_traffic_by_hand():
    """The second product is a batch of 8 written as a dimension of space, and stays on the chip."""
    assert product_flops(PRODUCTS) == 2 * 128 * 256 * 64 + 2 * 16 * 32 * 4 * 8
    block, index, weight, result = 2 * 128 * 256, 4, 2 * 256 * 64, 4 * 128 * 64
    assert hbm_bytes(PRODUCTS) == (block + index + block) + block + (weight + result)


def test_estimates_of_a_loop_count_for_each_trip():
    assert xla_cycles(HLO) == 500 + 32 * 70
    assert xla_cycles(HLO.replace("s32[]{:T", "u32[]{:T")) == 500 + 32 * 70
    assert xla_cycles(HLO.replace("constant(1)", "constant(2)")) == 500 + 16 * 70  # of a product taken in windows, over chips
    assert xla_cycles(HLO.replace("constant(1)", "constant(5)")) == 500 + 7 * 70
    stated = 'body=%body.1, backend_config={"known_trip_count":{"n":"31"}}'
    assert xla_cycles(HLO.replace("body=%body.1", stated)) == 500 + 31 * 70
    with pytest.raises(ValueError, match="no single constant number of trips"):
        xla_cycles(HLO.replace("constant(32)", "parameter(0)"))
    with pytest.raises(ValueError, match="no single constant number of trips"):
        xla_cycles(HLO.replace("constant(1)", "parameter(0)"))


def test_the_bound_takes_the_larger_of_schedule_and_memory():
    kernels = [{"cycles": 4e6, "bytes": 0, "vector_slots": 4}, {"cycles": 1e6, "bytes": 819e6 * 2, "vector_slots": 4}]
    program = Program("selective_scan", "s", "pallas_tpu", "both", lambda: None, (Kernel("k", 1, (), 0),), necessary=1024 * 10**7)
    found = report.bound(program, {"kernels": kernels, "xla_cycles": 5e5}, "v5e")
    assert (found.kernels, found.around) == (5.0, 0.5)
    assert found.memory == pytest.approx(3.0)
    assert found.total == pytest.approx(4.0 + 3.0 + 0.5)
    assert found.useful == pytest.approx(0.5)


def test_only_the_marked_section_of_the_page_is_written(tmp_path):
    page = tmp_path / "kernels.md"
    page.write_text("before\n<!-- schedule -->\nold\n<!-- /schedule -->\nafter\n")
    report.replace_section(page, "schedule", "new")
    assert page.read_text() == "before\n<!-- schedule -->\nnew\n<!-- /schedule -->\nafter\n"
    with pytest.raises(ValueError, match="has no <!-- clock -->"):
        report.replace_section(page, "clock", "new")


@pytest.mark.parametrize(("length", "window", "prefix"), [(40, None, 0), (40, 7, 0), (40, 7, 5), (40, 50, 5), (40, 0, 1)])
def test_allowed_pairs_equal_a_brute_force_count(length, window, prefix):
    query, key = np.indices((length, length))
    near = True if window is None else query - key <= window
    assert splash.allowed_pairs(length, window, prefix) == np.sum((key <= query) & (near | (key < prefix)))


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: the TPU compiler is not here")
def test_a_kernel_is_compiled_and_its_declared_visits_fit():
    """The convolution, because it compiles quickly: regions are found as declared, and all slots that it uses exist."""
    (program,) = (p for p in scan.programs() if p.name == "causal_conv/Hymba-300M/pallas_tpu/forward")
    result = compiled.spawn(program, "v5e")
    (kernel,) = result["kernels"]
    assert kernel["cycles"] > 1e5 and all(0 <= share <= 1 for share in kernel["slots"].values())
    assert kernel["slots"]["VALU"] > 0.3
