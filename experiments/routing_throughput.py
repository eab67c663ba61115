"""Routing throughput: how many questions per second find their K experts among N keys, alone and while answering.

    python -m experiments.routing_throughput --workdir=runs/routing_throughput
        [--num_experts=65536,1048576] [--batches=1,64,1024] [--lookups=exact,product,approximate] [--key_dim=128]

All contenders for one N and one batch take turns in one run, so that a noisy machine slows them all. `ceiling` is the
share of the speed that this machine allows: for flat keys, of the same matrix product followed by a maximum; for
product keys and for the gather, of copying the bytes that they must move. `recall` is the share of the plain
reference's experts that were found, `all K` the share of queries for which all of them were. Searches of other
libraries take turns too if they are installed (`pip install -e .[bench]`, and torch). With several devices, flat keys
are sharded over them; of product keys, the queries are.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import routing_throughput_serving as serving
from experiments.routing_throughput_peers import PEERS
from lamini_jax.config import Config, MemoryConfig, MeshConfig
from lamini_jax.errors import UserError
from lamini_jax.index import LOOKUPS
from lamini_jax.memory import experts
from lamini_jax.runtime import cli, processes, sharding, workdir

EXPERTS_BYTES = 2**30  # at most, for the gather; more than a cache holds cost the same
CHECKED_SCORES = 2**26  # at most, for the reference to sort


def define_flags() -> None:
    """The flags of this command."""
    cli.define_processes()
    flags.DEFINE_string("workdir", None, "Where results.json and figures.png go.", required=True)
    flags.DEFINE_list("num_experts", ["65536", "1048576"], "Numbers of experts.")
    flags.DEFINE_list("batches", ["1", "64", "1024"], "Numbers of questions looked up at once.")
    flags.DEFINE_list("lookups", LOOKUPS.names(), "Which lookups.")
    flags.DEFINE_list("answering", ["16384", "131072", "1048576"], "Numbers of experts to answer with.")
    flags.DEFINE_integer("key_dim", 128, "Floats of a key.", lower_bound=1)
    flags.DEFINE_enum("key_dtype", "float32", ["float32", "bfloat16"], "Format of keys and queries.")
    flags.DEFINE_float("seconds", 1.5, "Seconds for which each contender is timed, on average.", lower_bound=0)
    flags.DEFINE_integer("top_k", 32, "Experts to find per question.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure: each field is the flag of its name."""

    num_experts: tuple[int, ...]
    batches: tuple[int, ...]
    lookups: tuple[str, ...]
    answering: tuple[int, ...]
    key_dim: int
    key_dtype: str
    seconds: float
    top_k: int


def read_options(values: flags.FlagValues) -> Options:
    """The options that the flags give. Raises UserError for what cannot be looked up."""
    given: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Options)}
    for name in ("num_experts", "batches", "answering"):
        given[name] = positive_integers(name, given[name])
    options = Options(**{**given, "lookups": tuple(given["lookups"])})
    check(options)
    return options


def positive_integers(name: str, texts: list[str]) -> tuple[int, ...]:
    """The values of a list flag. Raises UserError if one is not a positive integer."""
    for text in texts:
        if not text.strip().isdecimal() or int(text) < 1:
            raise UserError(f"--{name}={','.join(texts)}: {text!r} is not a positive whole number")
    return tuple(int(text) for text in texts)


def check(options: Options) -> None:
    """Raises UserError for what cannot be looked up."""
    for name in options.lookups:
        if name not in LOOKUPS.names():
            there_are = f"there are {', '.join(LOOKUPS.names())}"
            raise UserError(f"--lookups={','.join(options.lookups)}: no lookup {name!r}; {there_are}")
    for num_experts in options.num_experts:
        if options.top_k > num_experts:
            raise UserError(f"--top_k={options.top_k}: more than --num_experts={num_experts}")
        for name in options.lookups:
            try:
                LOOKUPS[name].check(num_experts, options.key_dim)
            except UserError as error:
                here = re.sub(
                    r"--config\.\w+\.", "--", str(error)
                )  # the flags here have the same names, without groups
                raise UserError(f"{here} (or leave {name} out of --lookups)") from None
    least = MemoryConfig().top_k
    for num_experts in options.answering:
        if num_experts < least:
            raise UserError(f"--answering={num_experts}: must be at least {least}, which every question selects")


@dataclasses.dataclass
class Contender:
    """One way to look up. `launch()` begins and returns an answer, for which `wait` waits; `ids` makes ids_BK of it."""

    launch: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    ids: Callable[[Any], np.ndarray] = lambda answer: np.asarray(answer[0])
    memory_bytes: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def run(self, times: int = 1) -> float:
        """Seconds that one takes of so many, of which each is launched while the one before runs."""
        started = time.perf_counter()
        for _ in range(times):
            answer = self.launch()
        self.wait(answer)
        return (time.perf_counter() - started) / times


def compiled(function, *arguments) -> Contender:
    """A jitted function of arrays, compiled ahead, with the bytes of its arguments and temporaries."""
    executable = jax.jit(function).lower(*arguments).compile()
    analysis = executable.memory_analysis()
    memory = None if analysis is None else analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    return Contender(lambda: executable(*arguments), memory_bytes=memory)


def take_turns(contenders: dict[str, Contender], seconds: float) -> None:
    """Runs all in turn, after one turn that does not count: until each had its seconds, but at least three times.

    A quick one runs once before it is timed, so that what the previous one left in the caches, or its threads that
    still spin, do not count; on an accelerator several are launched, because that takes as long as a small lookup.
    Several processes take the same turns, by the first one's clock.
    """
    quick, times = {}, 1 if jax.default_backend() == "cpu" else 10
    for name, contender in contenders.items():
        contender.run()
        quick[name] = processes.broadcast(contender.run() < seconds)
    begun, turns = time.perf_counter(), 0
    while turns < 3 or processes.broadcast(time.perf_counter() - begun < 2 * seconds * len(contenders)):
        for name, contender in contenders.items():
            if quick[name]:
                contender.run()
            contender.seconds.append(contender.run(times if quick[name] else 1))
        turns += 1


def directions(seed: int, shape: tuple[int, ...], dtype: str, *axes: str | None):
    """Random vectors of unit length, made on the devices that keep them."""

    @jax.jit
    def draw(seed):
        values = jax.random.normal(jax.random.key(seed), shape)
        values = (values / jnp.linalg.norm(values, axis=-1, keepdims=True)).astype(dtype)
        return sharding.constrain(values, *axes)

    return draw(np.uint32(seed))


def make_tables(num_experts: int, options: Options) -> dict[str, jax.Array]:
    """The keys of N experts for each lookup; lookups whose keys have the same shape share them."""
    drawn, tables = {}, {}
    for name in options.lookups:
        struct, axes = LOOKUPS[name].spec(num_experts, options.key_dim)
        if struct not in drawn:
            drawn[struct] = directions(len(drawn), struct.shape, options.key_dtype, *axes)
        tables[name] = drawn[struct]
    return tables


def copy_bandwidth(seconds: float) -> float:
    """Bytes per second, read and written, of a copy too large for any cache."""
    copy = compiled(lambda x: x + 1, jnp.zeros(2**27, jnp.int32))
    take_turns({"copy": copy}, seconds)
    return 2 * 2**29 / copy.median


def matmul_max(keys_NC, query_BC):
    """The ceiling of a flat lookup: the same products, and one maximum instead of the K best."""
    # In this order of axes, in which XLA's CPU backend fuses the two; the other takes three times as long.
    full = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    return jnp.einsum("NC,BC->NB", keys_NC, query_BC, **full).max(axis=0)


def copy_from(experts_NR, at, count: int):
    """A plain copy of as many rows."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, count), experts_NR)


def share_found(ids_BK: np.ndarray, reference_BK: np.ndarray) -> tuple[float, float]:
    """The mean share of a query's experts that were found, and the share of queries with all of them."""
    shares = [np.isin(expected, ids).mean() for ids, expected in zip(ids_BK, reference_BK, strict=True)]
    return float(np.mean(shares)), float(np.mean(np.array(shares) == 1.0))


def lookups_at(
    num_experts: int, batch: int, tables: dict, searches: dict[str, Callable], bandwidth: float, options: Options
) -> Iterator[dict]:
    """Rows for one N and one batch: our lookups, their ceiling, and other libraries' searches, in turns."""
    k = options.top_k
    query_BC = directions(2, (batch, options.key_dim), options.key_dtype)
    contenders = {}
    for name in options.lookups:
        find = functools.partial(LOOKUPS[name].find, k=k, num_keys=num_experts)
        contenders[name] = compiled(find, tables[name], query_BC)
    flat = [name for name in options.lookups if tables[name].ndim == 2]
    if flat:
        contenders["matmul_max"] = compiled(matmul_max, tables[flat[0]], query_BC)
    query = np.asarray(query_BC, np.float32)
    for name, search in searches.items():
        contenders[name] = Contender(*search(query, k))
    take_turns(contenders, options.seconds)
    half = math.isqrt(num_experts)
    # Half-keys and queries read, the halves' scores written and read.
    product_bytes = 4 * (half * options.key_dim + batch * options.key_dim + 2 * 2 * batch * half)
    ceilings = {"product": product_bytes / bandwidth} | {name: contenders["matmul_max"].median for name in flat}
    checked, references = max(min(batch, CHECKED_SCORES // num_experts), 1), {}
    for name, contender in contenders.items():
        row = row_of(name, num_experts, batch, contender, ceilings.get(name), options)
        if name != "matmul_max":
            same = PEERS[name].lookup if name in PEERS else name
            reference = LOOKUPS[same].reference
            if reference not in references:
                ids = jax.jit(
                    lambda *arguments, find=reference: sharding.constrain(find(*arguments, k, num_experts)[0])
                )
                references[reference] = np.asarray(ids(tables[same], query_BC[:checked]))
            shares = share_found(contender.ids(contender.launch())[:checked], references[reference])
            row |= {"recall": shares[0], "queries_with_all": shares[1]}
        yield row


def row_of(
    name: str, num_experts: int, batch: int, contender: Contender, ceiling: float | None, options: Options
) -> dict:
    """The fields that every row has."""
    return {
        "lookup": name,
        "num_experts": num_experts,
        "key_dim": options.key_dim,
        "key_dtype": options.key_dtype if name in options.lookups or name == "matmul_max" else "float32",
        "top_k": options.top_k,
        "batch": batch,
        "queries_per_second": batch / contender.median,
        "seconds": contender.median,
        "ceiling_ratio": None if ceiling is None else ceiling / contender.median,
        "recall": None,
        "memory_bytes": contender.memory_bytes,
        "device": jax.devices()[0].device_kind,
    }


def gather_at(num_experts: int, batch: int, options: Options) -> dict:
    """The row of fetching K experts per question, its bytes per second against those of a plain copy."""
    shape = experts.expert_shape(Config().backbone, Config().memory)  # the tiny backbone's
    kept = min(num_experts, EXPERTS_BYTES // (4 * shape.floats))
    experts_NR = {name: sharding.zeros(part, np.float32, experts.AXES) for name, part in shape.parts(kept).items()}
    ids_BK = jax.random.randint(jax.random.key(3), (batch, options.top_k), 0, kept)
    count = min(ids_BK.size, kept)
    contenders = {"gather": compiled(experts.gather, experts_NR, ids_BK)}
    if sharding.current_mesh() is None:  # on a mesh, even a copy would be sent between devices
        contenders["copy"] = compiled(functools.partial(copy_from, count=count), experts_NR, kept // 3)
    take_turns(contenders, options.seconds)
    gather = contenders["gather"]
    moved = 2 * 4 * ids_BK.size * shape.floats
    ceiling = contenders["copy"].median * ids_BK.size / count if "copy" in contenders else None
    row = row_of("gather", num_experts, batch, gather, ceiling, options)
    return row | {"bytes_per_second": moved / gather.median}


def installed_peers(lookups: tuple[str, ...]) -> list[str]:
    """The other libraries' searches to run; prints which are left out."""
    names = []
    for name, peer in PEERS.items():
        if peer.lookup not in lookups:
            continue
        if importlib.util.find_spec(peer.module) is None:
            processes.print_once(f"{name}: left out, {peer.module} is not installed")
        elif jax.process_count() > 1:
            processes.print_once(f"{name}: left out, it runs in a single process")
        else:
            names.append(name)
    return names


def measure(options: Options) -> dict:
    """All rows, and how many bytes the machine copies per second."""
    peers = installed_peers(options.lookups)
    bandwidth = copy_bandwidth(options.seconds)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    processes.print_once(f"{device}: copies {bandwidth / 1e9:.1f} GB/s")
    rows = []
    steps = len(options.num_experts) * len(options.batches) + serving.TURNS + 1
    with processes.progress_bar(total=steps, unit="step") as bar:
        for num_experts in options.num_experts:
            tables = make_tables(num_experts, options)
            searches = {name: PEERS[name].make(np.asarray(tables[PEERS[name].lookup], np.float32)) for name in peers}
            for batch in options.batches:
                bar.set_postfix_str(f"{num_experts:,} experts, batch {batch}")
                rows += lookups_at(num_experts, batch, tables, searches, bandwidth, options)
                rows.append(gather_at(num_experts, batch, options))
                bar.update()
            del tables, searches
        bar.set_postfix_str("answering")
        answers = serving.rows(options.answering, bar)
    return {"rows": rows, "answering": answers, "copy_bytes_per_second": bandwidth}


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [
        f"{'lookup':<15}{'experts':>11}{'batch':>7}{'queries/s':>13}{'ms':>10}"
        f"{'ceiling':>9}{'recall':>8}{'all K':>7}{'MB':>8}"
    ]
    for row in rows:
        ceiling = "-" if row["ceiling_ratio"] is None else f"{row['ceiling_ratio']:.2f}"
        recall = f"{'-':>8}{'-':>7}"
        if row["recall"] is not None:
            recall = f"{row['recall']:>8.3f}{row['queries_with_all']:>7.2f}"
        memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.0f}"
        lines.append(
            f"{row['lookup']:<15}{row['num_experts']:>11,}{row['batch']:>7,}{row['queries_per_second']:>13,.0f}"
            f"{1e3 * row['seconds']:>10.2f}{ceiling:>9}{recall}{memory:>8}"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Queries per second against N, one panel per batch, with the ceiling of the flat lookups."""
    batches = sorted({row["batch"] for row in rows})
    names = [name for name in dict.fromkeys(row["lookup"] for row in rows) if name != "gather"]
    figure = Figure(figsize=(5 * len(batches), 5), layout="constrained")
    (axes,) = figure.subplots(1, len(batches), squeeze=False)
    for axis, batch in zip(axes, batches, strict=True):
        for name in names:
            points = [row for row in rows if row["batch"] == batch and row["lookup"] == name]
            style = {"matmul_max": "k:", "exact": "o-", "product": "s-", "approximate": "^-"}.get(name, "x--")
            label = "ceiling: matmul and max" if name == "matmul_max" else name
            numbers = [row["num_experts"] for row in points], [row["queries_per_second"] for row in points]
            axis.plot(*numbers, style, label=label)
        axis.set(title=f"batch {batch}", xlabel="experts N", ylabel="queries/s", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"top {rows[0]['top_k']} of N keys of width {rows[0]['key_dim']}, {rows[0]['device']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    options = read_options(flags.FLAGS)
    cli.start(MeshConfig())
    identity = dataclasses.asdict(options)
    del identity["seconds"]  # a longer measurement is less noisy, but the same
    directory = workdir.open_workdir(flags.FLAGS.workdir, identity)
    results = measure(options)
    workdir.write_json(directory / "results.json", results | {"environment": workdir.environment()})
    if processes.is_primary():
        draw(results["rows"], directory / "figures.png")
    processes.print_once(table(results["rows"]))
    processes.print_once(serving.table(results["answering"]))
    processes.print_once(f"{directory / 'results.json'}, {directory / 'figures.png'}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
