"""Requests that lose their place in the cache, and their row of the gate table, and come back."""

from __future__ import annotations

from tests.cram.serve.vllm.real.worlds import Job, World

# So few blocks that not all requests fit.
ENGINE = {"num_gpu_blocks_override": 9, "disable_log_stats": False}
# Sums of recomputed prefixes round in another order over 40 tokens.
AFTER_40_TOKENS = 5e-4


def test_preempted_requests_continue_with_their_gates(llava: World) -> None:
    jobs = [
        Job([7 + k, *range(20, 20 + n)], (), llava.gates(k) if k % 3 else "plain")
        for k, n in enumerate((30, 60, 25, 40, 33, 28))
    ]
    outputs = llava.run(jobs, 40)
    worst, same = llava.differences(jobs, outputs)
    preempted = [m.value for m in llava.engine.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(preempted) > 0 and worst < AFTER_40_TOKENS and same, (preempted, worst)
