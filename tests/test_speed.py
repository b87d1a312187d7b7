"""What keeps a step fast: nothing waits for the device, and a compiled step is one graph, made once."""

import pytest
import torch
from rich.console import Console
from tiny import METHODS, make, step
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from sslbench.pretrain import compose
from sslbench.train.loop import pretrain

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_to_cpu")  # on a GPU these wait for it


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_method_is_one_graph_and_stays_it(name):
    """dynamo's counts, by the backend that compiles nothing: of one trace, for every later step."""
    torch._dynamo.reset()
    counters.clear()
    method = make(name)
    method.compile(backend="eager")
    for i in range(3):
        step(method, i)["loss"].backward()
        method.after_step(i / 3)
    assert counters["stats"]["unique_graphs"] == counters["frames"]["total"] == 1, counters
    assert not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_device(name, tmp_path):
    """Of the loop itself, four steps; between the first and the third update no log step comes to read anything."""
    sets = ["science.batch_size=16", "science.epochs=0.016", "machine.tensorboard=false", "machine.precision=32"]
    recipe = compose(name, recipe=f"{name}_smoke", sets=[*sets, "machine.log_every=1000", "machine.save_every=1000"])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        pretrain(recipe, tmp_path / "run", Console(quiet=True), progress=False)
    events = seen.events()
    updates = sorted(e.time_range.start for e in events if e.name == "aten::_fused_adamw_")
    per_step = len(updates) // 4
    first, third = updates[0], updates[2 * per_step]
    waits = [e for e in events if e.name in WAITS and first < e.time_range.start < third]
    # The CPU's fused AdamW reads its step counts, and on a CPU the loop its guard, once a step; a GPU's do neither.
    waits = [e for e in waits if "aten::_fused_adamw_" not in ancestors(e)]
    assert per_step and len(waits) == 2, [ancestors(e) for e in waits]


def ancestors(event):
    names = []
    while event := event.cpu_parent:
        names.append(event.name)
    return names
