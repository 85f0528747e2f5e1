"""The scheduled kernels of a compiled step and their rows, without a compiler."""

from collections import Counter

import pytest

from kernels_pallas.bench import compiled
from metajax.config import Hybrid, MetaTokens
from metajax.planning.schedules import Call, scheduled


def attention_call(part, heads, length, visits, metas=0):
    queries = ("bf16", (heads, 1, 64, length))
    keys = ("bf16", (heads, length, 64))
    meta_keys = [("bf16", (heads, metas, 64))] * 2 if metas else []
    return Call(
        f"prefix_window_attention_{part}",
        (("s32", ()), ("s32", (visits + 1,)), ("s32", (1,)), ("s32", (1, 1)), queries, keys, keys, *meta_keys),
    )


@pytest.fixture
def spawned(monkeypatch):
    """The programs that were compiled alone; each kernel costs its declared visits."""
    made = []

    def spawn(program, chip):
        made.append(program)
        return {"kernels": [{"name": k.name, "least": sum(v.times for v in k.inside)} for k in program.kernels]}

    monkeypatch.setattr(compiled, "spawn", spawn)
    return made


def test_rows_of_tokens_and_of_meta_tokens_are_told_apart_by_their_visits(spawned, tiny_config):
    """Two rows of 1024 tokens are 2 x 2 blocks each, two rows of 409 meta-tokens one: 5 and 2 visits a row at most."""
    config = tiny_config(**{"data.sequence_length": 1024, "meta_tokens": MetaTokens(rate=409 / 1024)})
    assert (config.row_positions, config.row_meta_tokens) == (1024, 409)
    calls = Counter({attention_call("forward", 2, 2048, 10): 24, attention_call("forward", 2, 1024, 4): 12})
    among, rows = scheduled(calls, config, "v5e")
    assert {program.shape for program in spawned} == {
        '[409, null, 0, 2, 2, 64, 64, 1, "bfloat16"]',
        '[1024, null, 0, 2, 2, 64, 64, 1, "bfloat16"]',
    }
    assert (rows["times"], rows["cycles"]) == (24, 2 * (2 + 2 + 1 + 2 + 8 + 6)), "starts, ends, whole, cut, parts, seen parts"
    assert (among["times"], among["cycles"]) == (12, 2 * (1 + 1 + 0 + 1 + 4 + 3))
    assert rows["seconds"] == pytest.approx(24 * 42 / 1.5e9)
    with pytest.raises(ValueError, match="2048 queries with 29 visits are no rows of 1024 or 409 tokens"):
        scheduled(Counter({attention_call("forward", 2, 2048, 29): 1}), config, "v5e")


def test_an_unreadable_schedule_is_reported(monkeypatch, tiny_config):
    def spawn(program, chip):
        raise RuntimeError("it did not compile:\nValueError: 4 regions are declared")

    monkeypatch.setattr(compiled, "spawn", spawn)
    config = tiny_config(**{"data.sequence_length": 1024})
    (found,) = scheduled(Counter({attention_call("forward", 2, 1024, 5): 24}), config, "v5e")
    assert (found["times"], found["seconds"], found["unread"]) == (24, 0, "ValueError: 4 regions are declared")


def test_layers_of_a_hybrid_share_a_kernel_and_differ_in_visits(spawned, tiny_config):
    """One layer in three sees all, two a window, with a prefix; the cost of a call is their mean. A v5p has two cores."""
    mixers = Hybrid(prefix_tokens=128, full_layers=(0,), state=8)
    config = tiny_config(**{"data.sequence_length": 1024, "model.layers": 3, "model.window": 256, "model.hybrid": mixers})
    scan = Call("selective_scan_forward", (("s32", (4, 8, 1, 4)), ("bf16", (4, 1024, 256))))
    prefix = Call("selective_scan_forward", (("s32", (1, 1, 1, 4)), ("f32", (1, 128, 256))))
    found = scheduled(Counter({attention_call("forward", 2, 1024, 5, 128): 6, scan: 3, prefix: 3}), config, "v5p")
    assert {program.shape for program in spawned} == {
        '[1024, null, 128, 2, 2, 64, 64, 1, "bfloat16"]',
        '[1024, 256, 128, 2, 2, 64, 64, 1, "bfloat16"]',
        '[1024, 256, 8, 1, "bfloat16"]',
        '[128, 256, 8, 1, "float32"]',
    }
    attention = next(kernel for kernel in found if "attention" in kernel["name"])
    assert attention["cycles"] == round((21 + 2 * (2 + 2 + 0 + 3 + 12 + 7)) / 3 / 2)
    of_scan = {kernel["operands"][1]: kernel["cycles"] for kernel in found if "scan" in kernel["name"]}
    assert (
        of_scan.keys() == {"bf16[4, 1024, 256]", "f32[1, 128, 256]"}
        and of_scan["bf16[4, 1024, 256]"] > 4 * 4 * of_scan["f32[1, 128, 256]"]
    )
