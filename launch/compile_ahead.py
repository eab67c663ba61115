"""Compiles memory tuning for TPUs that are not at hand, and tells whether it fits and what travels.

    pip install -e .[compile]
    python -m launch.compile_ahead --config=experiments/configs/llama3_8b.py --topology=v5e:16x16 --workdir=runs/ahead
        [--num_experts=1048576,16777216]

The TPU compiler runs without a TPU. Three programs are compiled for the topology, sharded as the config says: the
tuning step, the selection of a question's experts, and decoding with them. The table shows, per device, the bytes of
what stays there, of the largest program's temporaries, and of the chip; the collectives of the step; its FLOPs, and the
least time that it can take: that of its products or of what travels, whichever is longer (those in a loop over layers
are counted once). Exit status 4 if something does not fit, with what is missing.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tqdm
from absl import flags
from jax.experimental import topologies

from lamini_jax import backbone, bank, command, decoding, model, router, row_optimizer, sharding, tuning
from lamini_jax.config import Config
from lamini_jax.data.batches import PROMPT_LENGTHS
from lamini_jax.errors import DEVICES, DOES_NOT_FIT, UserError

_CONFIG = command.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and shape of the slice, e.g. v5e:16x16.", required=True)
_NUM_EXPERTS = flags.DEFINE_list("num_experts", [], "Numbers of experts instead of the config's.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results.json goes.", required=True)

TOKENS = 128  # of a fact, question and answer
ANSWER = 48  # of them, at most
ASKED = 64  # questions answered at once
STOP = 0


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip has, from Google's public tables (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

    memory: int  # bytes
    flops: float  # per second, of bfloat16 products
    links: float  # bytes per second, between chips


CHIPS = {
    "TPU v4": Chip(32 * 2**30, 275e12, 300e9),
    "TPU v5 lite": Chip(16 * 2**30, 197e12, 200e9),
    "TPU v5": Chip(95 * 2**30, 459e12, 600e9),
    "TPU v6 lite": Chip(32 * 2**30, 918e12, 448e9),
}


def topology(name: str):
    """The devices of a slice. Raises UserError if there is no such slice, or no compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install -e .[compile]")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={name}: no such slice ({reason})", status=DEVICES) from None


def abstract(tree, axes):
    """Arrays that are only described, each where it will lie."""

    def of(leaf, names):
        layout = sharding.layout(names, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    return jax.tree.map(of, tree, axes)


def array(shape, dtype=np.float32, *names):
    return abstract(jax.ShapeDtypeStruct(shape, dtype), names)


@dataclasses.dataclass(frozen=True)
class Resident:
    """What stays on the devices."""

    params: backbone.Params
    state: tuning.MemoryState
    routing: router.Router
    bucket: tuning.Bucket


def resident(config: Config, decoder: backbone.Decoder, tx) -> Resident:
    """All of it, described. Every fact of `data.count` selects experts that no other one does, if there are as many."""
    c, shape = config.backbone, bank.row_shape(config.backbone, config.memory)
    params = jax.eval_shape(lambda: backbone.init(decoder, jax.random.key(0)))
    params = abstract(params, backbone.axes(c, params))
    num_experts = sharding.padded(config.memory.num_experts, "experts")
    parts = {name: jax.ShapeDtypeStruct(part, config.memory.dtype) for name, part in shape.parts(num_experts).items()}
    rows_NR = {name: abstract(part, bank.ROWS) for name, part in parts.items()}
    facts = sharding.padded(config.data.count, "facts")
    num_slots = min(facts * config.memory.selected, num_experts)
    slots = jax.eval_shape(lambda ids_S: row_optimizer.init(tx, ids_S, shape), array((num_slots,), np.int32))
    slots = slots.replace(
        expert_ids_S=array((num_slots,), np.int32, "experts"),
        state=abstract(slots.state, row_optimizer.axes(slots.state, shape)),
    )
    keys = jax.eval_shape(lambda: router.keys(config))
    keys = abstract(keys, ("keys", None) if config.router.lookup == "exact" else (None,) * 3)
    routing = router.Router(
        array((c.width,)),
        array((c.width, config.router.key_width)),
        keys,
        config.memory.num_experts,
        config.router.lookup,
    )
    per_fact = array((facts,), np.int32, "facts")
    selection = array((facts, config.memory.selected), np.int32, "facts", None)
    hidden_FTD = array((facts, TOKENS, c.width), np.float32, "facts", None, "width")
    answers = array((facts, ANSWER), np.int32, "facts", None)
    bucket = tuning.Bucket(hidden_FTD, per_fact, per_fact, answers, selection, selection)
    return Resident(params, tuning.MemoryState(rows_NR, slots), routing, bucket)


def programs(config: Config, decoder: backbone.Decoder, tx, there: Resident):
    """What is compiled: the jitted functions and what they are called with, by name."""
    shape, memory = bank.row_shape(config.backbone, config.memory), config.memory
    batch = sharding.padded(config.tuning.batch_size, "batch")
    # Of the batch's experts, as many in every shard but for chance: three times the average.
    touched = 3 * batch * memory.selected // sharding.size("experts")
    method = tuning.memory_method(decoder, shape, memory.target, tx, touched)
    rows_B = array((batch,), np.int32)
    prompt_BT, length_B = array((ASKED, PROMPT_LENGTHS[0]), np.int32), array((ASKED,), np.int32)
    parts = shape.parts(ASKED, memory.selected)
    rows_BKR = {name: array(part, memory.dtype, "batch", None, None, "columns") for name, part in parts.items()}
    gates_BK = array((ASKED, memory.selected))

    def answer(params, prompt_BT, length_B, rows_BKR, gates_BK):
        adapter = bank.adapter(rows_BKR, gates_BK, memory.target)
        adapted = decoding.Adapted(suffix=adapter)
        return decoding.generate(decoder, params, prompt_BT, length_B, ANSWER, (STOP,), adapted)

    def select(params, routing, prompt_BT, length_B):
        return model.select(decoder, params, routing, prompt_BT, length_B, memory.selected).expert_ids_BK

    return {
        "step": (method.step, (there.params, there.state, there.bucket, rows_B)),
        "select": (jax.jit(select), (there.params, there.routing, prompt_BT, length_B)),
        "decode": (jax.jit(answer), (there.params, prompt_BT, length_B, rows_BKR, gates_BK)),
    }


def bytes_of(tree) -> int:
    """On each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(text: str) -> list[dict]:
    """The collectives of a compiled program: kind, bytes that each leaves on a device, and how many there are.

    One that is cut into pieces, to run beside other work, is counted once, by its channel.
    """
    found, channels = collections.Counter(), set()
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        if channel and (match["op"], channel[1]) in channels:
            continue
        channels.add((match["op"], channel and channel[1]))
        sizes = [
            math.prod(int(n) for n in dims.split(",") if n) * _WIDTHS.get(dtype, 4)
            for dtype, dims in re.findall(r"\b([a-z]\w*\d|pred)\[([\d,]*)\]", match["type"])
        ]
        whole = match["type"].startswith("(") and not line.count(f"{match['op']}-start(")
        found[match["op"], sum(sizes) if whole else max(sizes)] += 1
    return [{"op": op, "bytes": size, "count": count} for (op, size), count in sorted(found.items())]


def compile_one(function, arguments):
    """The executable and its text, in the compiler's own words: not every text of it can be read back."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        executable = function.lower(*arguments).compile(compiler_options=options)
        texts = sorted(Path(directory).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return executable, texts[-1].read_text()


def row(config: Config, devices, progress) -> dict:
    """What one number of experts comes to."""
    chip = CHIPS[devices[0].device_kind]
    decoder = backbone.Decoder(config.backbone, config.memory.layers, config.tuning.rematerialize)
    tx = row_optimizer.make(config.tuning.optimizer, config.tuning.learning_rate)
    there = resident(config, decoder, tx)
    memory = {
        "backbone": bytes_of(there.params),
        "rows": bytes_of(there.state.rows_NR),
        "optimizer": bytes_of(there.state.slots),
        "keys": bytes_of(there.routing),
        "facts": bytes_of(there.bucket),
    }
    result = {"num_experts": config.memory.num_experts, "topology": _TOPOLOGY.value, "devices": len(devices)}
    temporaries, refused, travels = {}, None, []
    started = time.monotonic()
    for name, (function, arguments) in programs(config, decoder, tx, there).items():
        progress.set_postfix_str(f"{config.memory.num_experts:,} experts, {name}")
        try:
            executable, text = compile_one(function, arguments)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "hbm" not in str(error):
                raise
            refused = re.search(r"Exceeded hbm capacity by ([\d.]+[KMGT]?)", str(error))
            refused = f"{name}: the compiler misses {refused[1] if refused else 'some'}B"
            continue
        finally:
            progress.update()
        analysis = executable.memory_analysis()
        outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        temporaries[name] = analysis.temp_size_in_bytes + outputs
        if name == "step":
            travels = collectives(text)
    memory["temporaries"] = max(temporaries.values(), default=0)
    total = sum(memory.values())
    flops = step_flops(config) / len(devices)
    travelling = sum(one["bytes"] * one["count"] for one in travels)
    seconds = max(flops / chip.flops, travelling / chip.links)
    return result | {
        "bytes_per_device": total,
        "bytes": memory,
        "temporaries": temporaries,
        "chip_bytes": chip.memory,
        "fits": refused is None and total <= chip.memory,
        "refused": refused,
        "collectives": travels,
        "largest_collective_bytes": max((one["bytes"] for one in travels), default=0),
        "flops_per_device": flops,
        "step_seconds_at_least": seconds,
        "compile_seconds": round(time.monotonic() - started, 1),
    }


def step_flops(config: Config) -> float:
    """Of a tuning step on all devices: a product forward, one for the activations' gradient, and again if recomputed.

    Counted by hand, since the compiler counts the layers of a scan once.
    """
    c, memory = config.backbone, config.memory
    tokens = config.tuning.batch_size * TOKENS
    weights = sum(i * o for i, o in backbone.linear_shapes(c).values())
    attention = 2 * TOKENS * c.num_heads * c.head_width
    adapter = memory.selected * sum(backbone.linear_shapes(c)[memory.target])
    passes = 3 if config.tuning.rematerialize else 2
    layers = memory.layers * tokens * (passes * (weights + attention) + (passes + 1) * adapter)
    return 2.0 * (layers + 2 * config.tuning.batch_size * ANSWER * c.width * c.vocab_size)


def table(rows: list[dict]) -> str:
    """The rows as text, in GB."""
    names = ("backbone", "rows", "optimizer", "keys", "facts", "temporaries")
    lines = [f"{'experts':>12}" + "".join(f"{name:>13}" for name in names) + f"{'total':>9}{'chip':>7}  fits"]
    for one in rows:
        parts = "".join(f"{one['bytes'][name] / 1e9:>13.3f}" for name in names)
        total = f"{one['bytes_per_device'] / 1e9:>9.2f}{one['chip_bytes'] / 1e9:>7.1f}"
        lines.append(f"{one['num_experts']:>12,}{parts}{total}  {'yes' if one['fits'] else 'no'}")
    for one in rows:
        kinds = collections.Counter()
        for each in one["collectives"]:
            kinds[each["op"]] += each["bytes"] * each["count"]
        travels = ", ".join(f"{op} {size / 1e6:.1f} MB" for op, size in kinds.items())
        lines.append(
            f"{one['num_experts']:,} experts: {travels}; the largest {one['largest_collective_bytes'] / 1e6:.2f} MB; "
            f"{one['flops_per_device'] / 1e12:.2f} TFLOP, at least {1e3 * one['step_seconds_at_least']:.1f} ms a step; "
            f"compiled in {one['compile_seconds']:.0f} s"
        )
    return "\n".join(lines)


def main() -> None:
    config = model.configure(_CONFIG.value)
    for text in _NUM_EXPERTS.value:
        if not text.isdecimal() or int(text) < config.memory.selected:
            raise UserError(f"--num_experts={','.join(_NUM_EXPERTS.value)}: {text!r} is not a number of experts")
    sizes = [int(text) for text in _NUM_EXPERTS.value] or [config.memory.num_experts]
    devices = topology(_TOPOLOGY.value)
    if devices[0].device_kind not in CHIPS:
        raise UserError(f"--topology={_TOPOLOGY.value}: {devices[0].device_kind} is not among {', '.join(CHIPS)}")
    directory = command.open_workdir(_WORKDIR.value, {"topology": _TOPOLOGY.value, "num_experts": sizes})
    rows = []
    with sharding.use(config.mesh, devices), tqdm.tqdm(total=3 * len(sizes), unit="program") as bar:
        for num_experts in sizes:
            memory = dataclasses.replace(config.memory, num_experts=num_experts)
            rows.append(row(dataclasses.replace(config, memory=memory), devices, bar))
            command.write_json(directory / "results.json", {"rows": rows})
    print(f"{len(devices)} x {devices[0].device_kind}, GB per device")
    print(table(rows))
    for one in rows:
        if not one["fits"]:
            missing = one["bytes_per_device"] - one["chip_bytes"]
            how = f"{missing / 1e9:.2f} GB per device are missing" if missing > 0 else one["refused"]
            raise UserError(f"{one['num_experts']} experts do not fit a {_TOPOLOGY.value}: {how}", DOES_NOT_FIT)


if __name__ == "__main__":
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}  # there is no TPU to ask
    jax.config.update("jax_platforms", "cpu")
    command.run(main)
