"""Routing throughput: how many questions per second find their K experts among N keys, and what is left for answering.

    python -m experiments.routing_throughput --workdir=runs/routing_throughput
        [--num_experts=65536,1048576] [--batches=1,64,1024] [--lookups=exact,product,approximate] [--key_width=128]

Every contender for one N and one batch takes its turns in one run, so that a noisy machine slows them all. `ceiling` is
the share of what this machine allows: for flat keys, of the same matrix product followed by a maximum; for product keys
and for the gather, of the time in which the bytes that they must move are copied. `recall` is the share of the plain
reference's experts that were found, `all K` that of the queries that got every one. Peers run beside ours where they
are installed (`pip install -e .[bench]`, and torch). With several devices, flat keys are sharded over them, and product
keys' queries.
"""

import dataclasses
import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.parts import answering, figures, peers
from lamini_jax import bank, command, lookup, processes, sharding
from lamini_jax.config import Config, MeshConfig
from lamini_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Where results.json and figures.png go.", required=True)
_NUM_EXPERTS = flags.DEFINE_list("num_experts", ["65536", "1048576"], "Numbers of experts.")
_BATCHES = flags.DEFINE_list("batches", ["1", "64", "1024"], "Numbers of questions looked up at once.")
_LOOKUPS = flags.DEFINE_list("lookups", list(lookup.NAMES), "Which lookups.")
_ANSWERING = flags.DEFINE_list("answering", ["16384", "131072", "1048576"], "Numbers of experts to answer with.")
_KEY_WIDTH = flags.DEFINE_integer("key_width", 128, "Floats of a key.", lower_bound=1)
_KEY_DTYPE = flags.DEFINE_enum("key_dtype", "float32", ["float32", "bfloat16"], "Of keys and queries.")
_SECONDS = flags.DEFINE_float("seconds", 1.5, "That each contender is timed for, on average.", lower_bound=0)
_SELECTED = flags.DEFINE_integer("selected", 32, "Experts to find per question.", lower_bound=1)

BANK_BYTES = 2**30  # at most; more of them than any cache holds cost the same
CHECKED_SCORES = 2**26  # as many are sorted by the reference


@dataclasses.dataclass
class Contender:
    """One way to look up. `run()` returns its answer when it is done, as arrays whose first is ids_BK."""

    run: Callable
    memory_bytes: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compiled(function, *arguments) -> Contender:
    """A jitted function of arrays, compiled ahead, with what it needs beside its arguments."""
    executable = jax.jit(function).lower(*arguments).compile()
    analysis = executable.memory_analysis()
    memory = None if analysis is None else analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    return Contender(lambda: jax.block_until_ready(executable(*arguments)), memory)


def take_turns(contenders: dict[str, Contender]) -> None:
    """Runs all in turn, after one turn that does not count: until each had --seconds, but three times at least.

    Whoever is quick runs once before it is timed: what the one before left in the caches, or gave back to the system
    while its threads still spin, is not its doing.
    """
    quick = {}
    for name, contender in contenders.items():
        contender.run()
        started = time.perf_counter()
        contender.run()
        quick[name] = time.perf_counter() - started < _SECONDS.value
    begun, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - begun < 2 * _SECONDS.value * len(contenders):
        for name, contender in contenders.items():
            if quick[name]:
                contender.run()
            started = time.perf_counter()
            contender.run()
            contender.seconds.append(time.perf_counter() - started)
        turns += 1


def integers(flag) -> list[int]:
    """The values of a list flag. Raises UserError if one is no positive integer."""
    for text in flag.value:
        if not text.strip().isdecimal() or int(text) < 1:
            raise UserError(f"--{flag.name}={','.join(flag.value)}: {text!r} is not a positive whole number")
    return [int(text) for text in flag.value]


def check(sizes: list[int]) -> None:
    """Raises UserError for what cannot be looked up."""
    for name in _LOOKUPS.value:
        if name not in lookup.NAMES:
            raise UserError(
                f"--lookups={','.join(_LOOKUPS.value)}: no lookup {name!r}; there are {', '.join(lookup.NAMES)}"
            )
    for num_experts in sizes:
        if _SELECTED.value > num_experts:
            raise UserError(f"--selected={_SELECTED.value}: more than --num_experts={num_experts}")
        if "product" in _LOOKUPS.value and math.isqrt(num_experts) ** 2 != num_experts:
            raise UserError(
                f"--num_experts={num_experts}: must be a square for product keys (or leave them out of --lookups)"
            )
    if "product" in _LOOKUPS.value and _KEY_WIDTH.value % 2:
        raise UserError(
            f"--key_width={_KEY_WIDTH.value}: must be even for product keys (or leave them out of --lookups)"
        )


def directions(seed: int, shape: tuple[int, ...], *axes: str | None):
    """Random vectors of unit length, made where they lie."""

    @jax.jit
    def draw(seed):
        values = jax.random.normal(jax.random.key(seed), shape)
        values = (values / jnp.linalg.norm(values, axis=-1, keepdims=True)).astype(_KEY_DTYPE.value)
        return sharding.constrain(values, *axes)

    return draw(np.uint32(seed))


def make_tables(num_experts: int) -> dict:
    """The keys of N experts: flat ones, over all devices, and half-keys on each."""
    tables = {}
    if {"exact", "approximate"} & set(_LOOKUPS.value):
        shape = (sharding.padded(num_experts, "keys"), _KEY_WIDTH.value)
        tables["exact"] = directions(0, shape, "keys", None)
    if "product" in _LOOKUPS.value:
        tables["product"] = directions(1, (2, math.isqrt(num_experts), _KEY_WIDTH.value // 2))
    return tables


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy too large for any cache."""
    copy = compiled(lambda x: x + 1, jnp.zeros(2**27, jnp.int32))
    take_turns({"copy": copy})
    return 2 * 2**29 / copy.median


def matmul_max(keys_NC, query_BC):
    """The ceiling of a flat lookup: the same products, and one maximum instead of the K best."""
    # In this order of axes, in which XLA's CPU backend fuses the two; the other takes three times as long.
    scores_NB = jnp.einsum("NC,BC->NB", keys_NC, query_BC, **lookup.FULL)
    return scores_NB.max(axis=0)


def copy_from(rows_NR, at, count: int):
    """A plain copy of as many rows."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, count), rows_NR)


def found(ids_BK: np.ndarray, reference_BK: np.ndarray) -> tuple[float, float]:
    """The mean share of a query's experts that were found, and the share of queries with all of them."""
    shares = [np.isin(expected, ids).mean() for ids, expected in zip(ids_BK, reference_BK, strict=True)]
    return float(np.mean(shares)), float(np.mean(np.array(shares) == 1.0))


def lookups_at(num_experts: int, batch: int, tables: dict, searches: dict[str, peers.Search], bandwidth: float):
    """Rows for one N and one batch: ours, what they are measured against, and the peers, in turns."""
    k, width = _SELECTED.value, _KEY_WIDTH.value
    query_BC = directions(2, (batch, width))
    names = _LOOKUPS.value
    contenders, references = {}, {}
    checked = max(min(batch, CHECKED_SCORES // num_experts), 1)
    for name in names:
        family = "product" if name == "product" else "exact"
        find = functools.partial(lookup.find, name, k=k, num_keys=num_experts)
        contenders[name] = compiled(find, tables[family], query_BC)
        if family not in references:
            reference = jax.jit(getattr(lookup, f"{family}_reference"), static_argnums=2)
            keys = tables["product"] if family == "product" else tables["exact"][:num_experts]
            references[family] = np.asarray(reference(keys, query_BC[:checked], k)[0])
    if "exact" in names:
        contenders["matmul_max"] = compiled(matmul_max, tables["exact"], query_BC)
    query = np.asarray(query_BC, np.float32)
    for name, search in searches.items():
        contenders[name] = Contender(lambda search=search: (search(query, k),))
    take_turns(contenders)
    half = math.isqrt(num_experts)
    # Half-keys and queries read, the halves' scores written and read.
    product_bytes = 4 * (half * width + batch * width + 2 * 2 * batch * half)
    ceilings = {"product": product_bytes / bandwidth}
    if "matmul_max" in contenders:
        ceilings |= {"exact": contenders["matmul_max"].median, "approximate": contenders["matmul_max"].median}
    for name, contender in contenders.items():
        row = row_of(name, num_experts, batch, contender, ceilings.get(name))
        family = "product" if name.endswith("product") else "exact"
        if name != "matmul_max":
            shares = found(np.asarray(contender.run()[0])[:checked], references[family])
            row |= {"recall": shares[0], "queries_with_all": shares[1]}
        yield row


def row_of(name: str, num_experts: int, batch: int, contender: Contender, ceiling: float | None) -> dict:
    """What every row holds."""
    return {
        "lookup": name,
        "num_experts": num_experts,
        "key_width": _KEY_WIDTH.value,
        "key_dtype": _KEY_DTYPE.value if name in (*lookup.NAMES, "matmul_max") else "float32",
        "selected": _SELECTED.value,
        "batch": batch,
        "queries_per_second": batch / contender.median,
        "seconds": contender.median,
        "ceiling_ratio": None if ceiling is None else ceiling / contender.median,
        "recall": None,
        "memory_bytes": contender.memory_bytes,
        "device": jax.devices()[0].device_kind,
    }


def gather_at(num_experts: int, batch: int) -> dict:
    """The row of fetching K experts' rows per question, its bytes per second against those of a plain copy."""
    k = _SELECTED.value
    shape = bank.row_shape(Config().backbone, Config().memory)  # the tiny backbone's
    kept = min(num_experts, BANK_BYTES // (4 * shape.floats))
    rows_NR = {name: sharding.zeros(part, np.float32, bank.ROWS) for name, part in shape.parts(kept).items()}
    ids_BK = jax.random.randint(jax.random.key(3), (batch, k), 0, kept)
    count = min(batch * k, kept)
    contenders = {
        "gather": compiled(bank.gather, rows_NR, ids_BK),
        "copy": compiled(functools.partial(copy_from, count=count), rows_NR, kept // 3),
    }
    take_turns(contenders)
    gather = contenders["gather"]
    moved = 2 * 4 * batch * k * shape.floats
    ceiling = contenders["copy"].median * batch * k / count
    return row_of("gather", num_experts, batch, gather, ceiling) | {"bytes_per_second": moved / gather.median}


def installed_peers() -> list[str]:
    """The peers to run; says which are left out."""
    names = []
    for name, (module, family, _) in peers.PEERS.items():
        if family not in _LOOKUPS.value:
            continue
        if importlib.util.find_spec(module) is None:
            print(f"{name}: left out, {module} is not installed")
        else:
            names.append(name)
    return names


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [
        f"{'lookup':<15}{'experts':>11}{'batch':>7}{'queries/s':>13}{'ms':>10}{'ceiling':>9}{'recall':>8}{'MB':>8}"
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


def main() -> None:
    sizes, batches, answering_sizes = integers(_NUM_EXPERTS), integers(_BATCHES), integers(_ANSWERING)
    check(sizes)
    sharding.use(MeshConfig())
    identity = {
        name: flags.FLAGS[name].value for name in ("num_experts", "batches", "lookups", "key_width", "selected")
    }
    directory = command.open_workdir(_WORKDIR.value, identity | {"key_dtype": _KEY_DTYPE.value})
    names = installed_peers()
    bandwidth = copy_bandwidth()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}: copies {bandwidth / 1e9:.1f} GB/s", flush=True)
    rows = []
    with processes.bar(total=len(sizes) * len(batches) + answering.TURNS + 1, unit="step") as bar:
        for num_experts in sizes:
            tables = make_tables(num_experts)
            searches = {}
            for name in names:
                _, family, make = peers.PEERS[name]
                searches[name] = make(np.asarray(tables[family], np.float32))
            for batch in batches:
                bar.set_postfix_str(f"{num_experts:,} experts, batch {batch}")
                rows += lookups_at(num_experts, batch, tables, searches, bandwidth)
                rows.append(gather_at(num_experts, batch))
                bar.update()
            del tables, searches
        bar.set_postfix_str("answering")
        answers = answering.rows(answering_sizes, bar)
    results = {"rows": rows, "answering": answers, "copy_bytes_per_second": bandwidth}
    command.write_json(directory / "results.json", results | {"environment": command.environment()})
    figures.routing_throughput(rows, directory / "figures.png")
    print(table(rows))
    print(answering.table(answers))
    print(f"{directory / 'results.json'}, {directory / 'figures.png'}")


if __name__ == "__main__":
    command.run(main)
