"""What is advised where a plan does not fit, without a compiler; the page of a plan."""

from metajax.planning.advice import advise, candidates, largest_batch, largest_buffers
from metajax.reporting.plan_page import write_plan_page

ERROR = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.57G of 15.48G hbm.

  Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(step)/transpose/dot_general" source_file="/x/lm.py" source_line=73
     Shape: f32[8,2048,32000]{2,1,0:T(8,128)}
     Unpadded size: 1.50G
     ==========================

  2. Size: 512.0M
     Shape: bf16[4,4]{1,0}
     ==========================

  3. Size: 3.0K
     Shape: s32[768]{0}
     ==========================

  4. Size: 1.0K
     Shape: s32[256]{0}
"""


def test_the_largest_buffers_are_read_off_the_compilers_error():
    first, second, third = largest_buffers(ERROR)
    assert first == {
        "bytes": 1.5 * 2**30, "shape": "f32[8,2048,32000]{2,1,0:T(8,128)}", "operation": "jit(step)/transpose/dot_general",
        "file": "/x/lm.py", "line": "73",
    }  # fmt: skip
    assert (second["bytes"], second["operation"], third["bytes"]) == (2**29, None, 3072)
    assert largest_buffers("RESOURCE_EXHAUSTED: no list") == []


def test_the_first_change_that_fits_is_advised(tiny_config):
    config = tiny_config(**{"data.batch_rows": 16})
    assert list(candidates(config, shards=4)) == [
        {"runtime.remat": "dots"}, {"runtime.remat": "full"}, {"runtime.remat": "full", "training.accumulate": 2},
        {"runtime.remat": "full", "training.accumulate": 4},
    ]  # fmt: skip
    tried = []

    def plan(changed):
        tried.append(changed)
        return {"fits": changed.training.accumulate == 2, "memory": {"total": 7}}

    assert advise(config, 4, plan) == {"changes": {"runtime.remat": "full", "training.accumulate": 2}, "total": 7}
    assert len(tried) == 3
    assert advise(config, 4, lambda changed: {"fits": False}) is None


def test_the_largest_batch_is_found_by_bisection():
    for most in (0, 3, 4, 36, 100, 1000):
        tried = []

        def fits(rows, most=most, tried=tried):
            tried.append(rows)
            return rows <= most

        assert largest_batch(4, 32, fits) == most // 4 * 4
        assert len(tried) == len(set(tried)) and len(tried) < 14


def test_the_page_of_a_plan(tmp_path):
    gib = 2**30
    plan = {
        "name": "x", "scale": "paper", "topology": "v5e:2x2", "chips": 4, "fits": True, "compile_seconds": 3.0, "flops": 1e12, "tokens": 8192,
        "state": {"parameters": gib, "optimizer": 2 * gib}, "kernels": [],
        "memory": {"arguments": 4 * gib, "outputs": 0, "temporaries": 8 * gib, "program": gib, "total": 13 * gib, "limit": 16 * gib},
        "collectives": {"all-gather": {"count": 3, "bytes": 5e6, "seconds": 1e-3}},
        "bound": {"operations": 0.1, "xla_estimate": 0.2, "links": 0.01, "step": 0.2, "mfu": 0.5},
    }  # fmt: skip
    write_plan_page(tmp_path / "plan.html", plan)
    page = (tmp_path / "plan.html").read_text()
    assert "13.000 GiB" in page and "of 16 GiB" in page and 'style="width: 50.00%"' in page and "3 times, 5.0 MB" in page
    broken = {"fits": False, "reason": "RESOURCE_EXHAUSTED", "largest_buffers": largest_buffers(ERROR), "largest_batch": 8}
    broken["advice"] = {"changes": {"runtime.remat": "full"}, "total": 13 * gib}
    write_plan_page(tmp_path / "plan.html", plan | broken)
    page = (tmp_path / "plan.html").read_text()
    for text in ("1.50 GiB: f32[8,2048,32000]", "/x/lm.py:73", "--set runtime.remat=full: 13.00 GiB", "data.batch_rows=8"):
        assert text in page
