r"""Compiles memory tuning for TPUs without having them, and shows whether it fits and what is sent between chips.

    pip install -e .[compile]
    python -m experiments.compile_ahead --config=experiments/configs/llama3_8b.py --topology=v5e:16x16 \
        --workdir=runs/ahead [--num_experts=1048576,16777216]

The TPU compiler runs without a TPU. Three programs are compiled for the topology, sharded as the config says: the
tuning step, the selection of a question's experts, and decoding with them. The table shows, per device, the bytes of
what stays there, of the largest program's temporaries, and of the chip; the collectives of the step; its FLOPs, and the
least time that it can take: that of its matrix products or of its collectives (those in a loop over layers are counted
once), whichever is longer. Exits with status 4 if something does not fit, and says what is missing.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import tqdm
from absl import flags
from jax.experimental import topologies

from experiments.shared import flops, study
from lamini_jax import Config
from lamini_jax.backbone import decoding, transformer
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.data.batches import PROMPT_LENGTHS
from lamini_jax.errors import DEVICES, DOES_NOT_FIT, UserError
from lamini_jax.memory import experts, routers, storage
from lamini_jax.runtime import processes, sharding
from lamini_jax.training import memory_method

TOKENS = 128  # of a fact, question and answer
ANSWER = 48  # of them, at most
ASKED = 64  # questions answered at once


def define_flags() -> None:
    flags.DEFINE_string("topology", None, "Kind and shape of the slice, e.g. v5e:16x16.", required=True)
    flags.DEFINE_list("num_experts", [], "Numbers of experts instead of the config's.")


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


def described(shape, dtype=np.float32, *axes: str | None) -> jax.ShapeDtypeStruct:
    """The description of an array with its sharding."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding_of(axes, shape))


def bytes_of(tree) -> int:
    """The bytes of a tree of arrays on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(text: str) -> list[dict]:
    """The collectives of a compiled program: kind, bytes that each leaves on a device, and how many there are.

    One that is split into pieces, to run at the same time as other work, is counted once.
    """
    found, seen = collections.Counter(), set()
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        # What is sent inside of shard_map has the same channel throughout, but not the same name and shape.
        shapes = re.findall(r"\b([a-z]\w*\d|pred)\[([\d,]*)\]", match["type"])
        one = match["op"], *re.findall(r'channel_id=\d+|op_name="[^"]*"', line), *shapes
        if "channel_id" in line and one in seen:
            continue
        seen.add(one)
        sizes = [math.prod(int(n) for n in dims.split(",") if n) * _WIDTHS.get(dtype, 4) for dtype, dims in shapes]
        whole = match["type"].startswith("(") and not line.count(f"{match['op']}-start(")
        found[match["op"], sum(sizes) if whole else max(sizes)] += 1
    return [{"op": op, "bytes": size, "count": count} for (op, size), count in sorted(found.items())]


def compile_one(function, arguments):
    """The executable and its text, which the compiler writes to a file: jax cannot return every program's text."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        executable = function.lower(*arguments).compile(compiler_options=options)
        texts = sorted(Path(directory).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return executable, texts[-1].read_text()


def programs(config: Config) -> tuple[dict, dict]:
    """By name, descriptions of what stays on the devices; and what is compiled: jitted functions and arguments."""
    decoder = transformer.Decoder(config.backbone, config.memory.num_layers, config.execution.remat)
    params = jax.eval_shape(lambda: transformer.init(decoder, jax.random.key(0)))
    axes = transformer.axes(config.backbone, params)
    params = jax.tree.map(lambda leaf, names: described(leaf.shape, leaf.dtype, *names), params, axes)
    step, state, facts = memory_method.describe(config, TOKENS, ANSWER)
    router, model = routers.KINDS[config.router.kind].spec(config), FrozenModel(params, decoder, ByteTokenizer())
    resident = {
        "backbone": params,
        "experts": state.experts_NR,
        "optimizer": state.slots,
        "keys": router,
        "facts": facts,
    }
    k, target, shape = config.memory.top_k, config.memory.target, experts.expert_shape(config.backbone, config.memory)
    index_B = described((sharding.round_up(config.tuning.batch_size, "batch"),), np.int32)
    prompts = described((ASKED, PROMPT_LENGTHS[0]), np.int32), described((ASKED,), np.int32)
    parts = shape.parts(ASKED, k)
    rows_BKR = {
        name: described(part, config.memory.dtype, "batch", None, None, "columns") for name, part in parts.items()
    }

    def select(router, model, prompt_BT, length_B):
        return routers.select(router, model, prompt_BT, length_B, k).expert_ids_BK

    def answer(model, prompt_BT, length_B, rows_BKR, gates_BK):
        adapters = storage.adapters(experts.adapter(rows_BKR, gates_BK, target), config.memory.positions)
        state = decoding.prefill(model, prompt_BT, length_B, ANSWER, adapters)
        reach = decoding.reach_for(state, prompt_BT.shape[1] + ANSWER)
        return decoding.decode(model, state, ANSWER, adapters, reach=reach).answer_BA

    return resident, {
        "step": (step, (model, state, facts, index_B)),
        "select": (jax.jit(select), (router, model, *prompts)),
        "decode": (jax.jit(answer), (model, *prompts, rows_BKR, described((ASKED, k)))),
    }


def compile_all(config: Config, bar: tqdm.tqdm) -> dict:
    """The bytes of what stays on a device and of each program's temporaries, the step's collectives, or a refusal."""
    resident, functions = programs(config)
    sizes = {name: bytes_of(tree) for name, tree in resident.items()}
    result = {"bytes": sizes, "temporaries": {}, "refused": None, "collectives": []}
    for name, (function, arguments) in functions.items():
        bar.set_postfix_str(f"{config.memory.num_experts:,} experts, {name}")
        try:
            executable, text = compile_one(function, arguments)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "hbm" not in str(error):
                raise
            missing = re.search(r"Exceeded hbm capacity by ([\d.]+[KMGT]?)", str(error))
            result["refused"] = f"{name}: the compiler lacks {missing[1] if missing else 'some'}B"
            continue
        finally:
            bar.update()
        analysis = executable.memory_analysis()
        outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        result["temporaries"][name] = analysis.temp_size_in_bytes + outputs
        if name == "step":
            result["collectives"] = collectives(text)
    sizes["temporaries"] = max(result["temporaries"].values(), default=0)
    return result


def row(config: Config, devices, bar: tqdm.tqdm) -> dict:
    """The results for one number of experts."""
    chip = CHIPS[devices[0].device_kind]
    compiled = compile_all(config, bar)
    total, sent = sum(compiled["bytes"].values()), [one["bytes"] * one["count"] for one in compiled["collectives"]]
    per_fact = flops.per_fact(config, "mome", TOKENS, ANSWER, remat=config.execution.remat)
    step_flops = config.tuning.batch_size * per_fact / len(devices)
    return compiled | {
        "num_experts": config.memory.num_experts,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "bytes_per_device": total,
        "chip_bytes": chip.memory,
        "fits": compiled["refused"] is None and total <= chip.memory,
        "largest_collective_bytes": max((one["bytes"] for one in compiled["collectives"]), default=0),
        "flops_per_device": step_flops,
        "step_seconds_at_least": max(step_flops / chip.flops, sum(sent) / chip.links),
    }


def table(results: dict) -> str:
    """The rows as text, in GB per device."""
    rows = results["rows"]
    names = ("backbone", "experts", "optimizer", "keys", "facts", "temporaries")
    lines = [f"{rows[0]['devices']} x {rows[0]['device_kind']}, GB per device"]
    lines.append(f"{'experts':>12}" + "".join(f"{name:>13}" for name in names) + f"{'total':>9}{'chip':>7}  fits")
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
            f"compiled in {one['seconds']:.0f} s"
        )
    return "\n".join(lines)


def main(arguments: study.Arguments) -> None:
    # There is no TPU to query, nor one that only a single process may use.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    config, name = arguments.config, arguments.flags.topology
    sizes = study.positive_integers("num_experts", arguments.flags.num_experts) or [config.memory.num_experts]
    if min(sizes) < config.memory.top_k:
        raise UserError(f"--num_experts={min(sizes)}: fewer than --config.memory.top_k={config.memory.top_k}")
    devices = topology(name)
    if devices[0].device_kind not in CHIPS:
        raise UserError(f"--topology={name}: {devices[0].device_kind} is not among {', '.join(CHIPS)}")
    directory = study.open_study(arguments.workdir, config, topology=name, num_experts=sizes)
    rows = []
    with (
        sharding.set_mesh(config.execution.mesh, devices),
        processes.progress_bar(total=3 * len(sizes), unit="program") as bar,
    ):
        for num_experts in sizes:
            memory = dataclasses.replace(config.memory, num_experts=num_experts)
            sized = dataclasses.replace(config, memory=memory)
            rows.append(study.cached(directory / f"{num_experts}.json", row, sized, devices, bar))
    results = {"topology": name, "rows": rows, **study.totals(rows)}
    study.finish(directory, results, table)
    for one in rows:
        if not one["fits"]:
            missing = one["bytes_per_device"] - one["chip_bytes"]
            how = f"{missing / 1e9:.2f} GB per device are missing" if missing > 0 else one["refused"]
            raise UserError(f"{one['num_experts']} experts do not fit a {name}: {how}", DOES_NOT_FIT)


if __name__ == "__main__":
    study.start(main, define_flags, on_devices=False)
