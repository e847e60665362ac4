"""Where an encoder's time goes, by what its operations do: torch's profiler over whole steps, forward and backward.

Each operation's own time is counted once, under the first part whose pattern occurs among its name and the names of the
operations that called it. What no operation accounts for is Python, autograd and the profiler itself. Only for encoders
that multiply nothing element by element except in the rotation: eager attention scales its scores.
"""

from __future__ import annotations

import re
import time

from torch.profiler import ProfilerActivity, profile
from turns import Contender

# Part -> pattern over the names of an operation and its callers, outermost first; the first match counts.
PARTS: dict[str, str] = {
    "embedding": r"conv|div|Div|sub|rsub",
    "attention": r"scaled_dot_product|_HeadByHead|softmax|Softmax|bmm",
    "norms": r"norm",
    "GELU": r"gelu|Gelu",
    "rotary": r"_Rotate|::stack|Stack|::neg|Neg|::mul|MulBackward|addcmul|::cos|::sin|::flip",
    "linear maps": r"::(add)?mm\b|matmul|linear|OneDnnLinear",
    "bias and residual adds": r"::add|AddBackward|::sum|AccumulateGrad",
    "cutting and joining": r"::cat|Split|Slice|::split|copy_|clone|contiguous|zeros|fill",
}
REST = "Python, autograd"
STEPS = 2


def measure_parts(contender: Contender) -> dict[str, float]:
    """Returns part -> seconds of a step; their sum is the profiled step's time.

    Args:
        contender: does the work on the CPU; it is warm.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS):
            contender.step()
        total = time.perf_counter() - start
    events = profiler.events()
    assert events is not None
    parts = dict.fromkeys((*PARTS, REST), 0.0)
    for event in events:
        chain, caller = event.name, event.cpu_parent
        while caller is not None:
            chain, caller = f"{caller.name}/{chain}", caller.cpu_parent
        if re.match(r"(aten|mkldnn)::", event.name):
            parts[_part_of(chain)] += event.self_cpu_time_total / 1e6 / STEPS
    parts[REST] += total / STEPS - sum(parts.values())
    return parts


def _part_of(chain: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, chain)), REST)
