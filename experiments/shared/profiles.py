"""Where the time of a compiled program goes, by named scope, and what the machine could do at most."""

import collections
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lamini_jax.backbone.linear_layers import contract

SCOPES = "gather", "attention", "mlp", "logits", "optimizer"
OTHER = "other"
_TURNS = 5


def milliseconds_by_scope(compiled: jax.stages.Compiled, run: Callable[[], None], times: int = _TURNS) -> dict:
    """Milliseconds that each named scope takes of a run of the program, forward and backward apart.

    They are the times of its operations, of which several may run at once; time in between is nobody's.
    """
    scopes = {name: _scope(op_name) for name, op_name in _op_names(compiled.as_text())}
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(times):
                run()
        totals: collections.Counter[str] = collections.Counter()
        for path in Path(directory).rglob("*.xplane.pb"):
            planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
            # On an accelerator, the host's times are those of launching the same operations.
            for plane in [plane for plane in planes if plane.name.startswith("/device:")] or planes:
                for line in plane.lines:
                    for name, nanoseconds in _own_times(line):
                        if name in scopes:
                            totals[scopes[name]] += nanoseconds
                        elif plane.name.startswith("/device:"):
                            totals[OTHER] += nanoseconds
    return {scope: totals[scope] / times / 1e6 for scope in _ordered(totals)}


def _op_names(text: str) -> list[tuple[str, str]]:
    """The instructions of a compiled program, and the names that jax gave to what they compute."""
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?$", text, re.M)
    names = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.M))
    return [(name, names.get(name, "")) for name in found]


def _scope(op_name: str) -> str:
    for scope in SCOPES:
        if scope in re.split(r"[/()]", op_name):
            return f"{scope}, backward" if "transpose(" in op_name else scope
    return OTHER


def _own_times(line) -> list[tuple[str, float]]:
    """The operations of a line of a profile, each without the time of those inside it."""
    events = sorted(line.events, key=lambda event: (event.start_ns, -event.duration_ns))
    own, open_events = [event.duration_ns for event in events], []
    for index, event in enumerate(events):
        while open_events and events[open_events[-1]].end_ns <= event.start_ns:
            open_events.pop()
        if open_events:
            own[open_events[-1]] -= event.duration_ns
        open_events.append(index)
    return [(_operation(event), nanoseconds) for event, nanoseconds in zip(events, own, strict=True)]


def _operation(event) -> str:
    """The instruction that an event is: GPUs name kernels otherwise, and say which instruction each belongs to."""
    return str(dict(event.stats).get("hlo_op", event.name)).lstrip("%").partition(" ")[0]


def _ordered(totals) -> list[str]:
    order = [name for scope in SCOPES for name in (scope, f"{scope}, backward")] + [OTHER]
    return [name for name in order if name in totals]


def product_rate(dtype: str = "float32") -> float:
    """GFLOP/s of a plain product of square matrices of this format, with float32 sums."""
    size = 2048 if jax.default_backend() == "cpu" else 8192  # an accelerator takes longer for it than to launch it
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)  # with zeros some accelerators are faster
    return 2 * size**3 / _seconds(lambda x: contract("IJ,JK->IK", x, x, dtype), x) / 1e9


def copy_rate() -> float:
    """GB/s, read and written, of a copy too large for any cache."""
    size = 2**27 if jax.default_backend() == "cpu" else 2**29
    return 8 * size / _seconds(lambda x: x + 1, jnp.zeros(size, jnp.int32)) / 1e9


def _seconds(function: Callable, argument) -> float:
    """The median time of some runs, compiled before."""
    compiled, seconds = jax.jit(function).lower(argument).compile(), []
    for _ in range(_TURNS + 1):
        started = time.perf_counter()
        jax.block_until_ready(compiled(argument))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
