"""A tuned memory for answering: read from a run's directory, or from a directory that `lamini_jax.export` wrote.

It holds only the experts that facts have trained: all others add nothing. A memory works only with the weights that it
was tuned with, which is checked by their fingerprint.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lamini_jax.backbone import json_file
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import Adapters, FrozenModel
from lamini_jax.backbone.json_file import shown
from lamini_jax.backbone.linear_layers import Adapter
from lamini_jax.config import Config, MemoryConfig, RouterConfig, from_config_dict, identity
from lamini_jax.errors import UserError
from lamini_jax.index import LOOKUPS
from lamini_jax.memory import experts, routers, slots, store
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.runtime import checkpointing, cli, paths, sharding

_DESCRIPTION, _TENSORS = "memory.json", "memory.safetensors"


@dataclasses.dataclass(frozen=True)
class StoredMemory:
    """What is needed to answer questions, in addition to the backbone."""

    router: routers.Router
    expert_ids_S: jax.Array  # ascending
    experts_SR: dict[str, jax.Array]
    fingerprint: str  # of the backbone


def is_export(directory: Path) -> bool:
    """Whether a directory holds an exported memory, and not a run."""
    return (directory / _DESCRIPTION).is_file()


def run_config(directory: Path) -> Config:
    """The config of a run that has finished. Raises UserError if none has."""
    path = directory / "config.json"
    check_complete(directory)
    if not any((directory / name).is_file() for name in ("results.json", store.NAME)) or not path.is_file():
        message = "has no finished checkpoint; finish python -m lamini_jax.tune in it first"
        raise UserError(f"--workdir={directory}: {message}")
    return _config(path, json_file.read(path))


def check_complete(directory: Path) -> None:
    """Raises UserError for a memory of facts that has lost its config."""
    lost = False
    with contextlib.suppress(OSError):  # whoever opens the directory says what is wrong with it
        lost = (directory / store.NAME).is_file() and not (directory / "config.json").is_file()
    if lost:
        raise UserError(f"--workdir={directory}: has {store.NAME} without its config.json; put that back too")


def load_run(config: Config, directory: Path, step: int | None = None) -> StoredMemory:
    """The memory in the newest checkpoint of a run. Raises UserError if there is none, or none of `step`."""
    saved = checkpointing.Checkpoints(directory).latest() if directory.is_dir() else None
    if saved is None:
        raise UserError(f"{directory}: has no finished checkpoint; finish python -m lamini_jax.tune first")
    if step not in (None, saved.step):
        missing = f"the checkpoint of step {step}, which results.json describes, is missing"
        raise UserError(f"{directory}: {missing}; run python -m lamini_jax.tune again")
    saved_ids_S = saved.arrays["expert_ids_S"]
    ids_S = _padded(np.sort(saved_ids_S[saved_ids_S != EMPTY_SLOT]))
    shape = experts.expert_shape(config.backbone, config.memory)
    tables = slots.permute_slots(saved.tables["experts"], saved_ids_S, ids_S, shape)
    router = routers.restore(config, saved.arrays, saved.record["router"])
    experts_SR = dict(zip(experts.PARTS, tables, strict=True))
    return StoredMemory(router, sharding.put(ids_S), experts_SR, saved.record["backbone"])


def export_config(directory: Path) -> Config:
    """The config of an exported memory. Raises UserError if there is none."""
    return _config(directory / _DESCRIPTION, _description(directory))


def load_export(config: Config, directory: Path) -> StoredMemory:
    """An exported memory. Raises UserError if it is damaged."""
    path, description = directory / _TENSORS, _description(directory)
    count = description["experts"]
    shape = experts.expert_shape(config.backbone, config.memory)
    expected = {"expert_ids_S": (count,)} | {f"{name}_SR": part for name, part in shape.parts(count).items()}
    try:
        with paths.local_file(path) as file:
            tensors = load_file(file)
        for name, part in expected.items():
            if name not in tensors:
                raise ValueError(f"has no tensor {name}")
            if tensors[name].shape != part:
                raise ValueError(f"{name} has shape {tensors[name].shape}; expected {part}")
            _check_values(name, tensors[name], config.memory)
    # Of a dtype that numpy does not have it is a KeyError or a TypeError.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export it again") from None
    try:
        router = routers.restore(config, tensors, description["router"])
    except KeyError as error:
        raise UserError(f"{directory / _DESCRIPTION}: has no {error} of the router; export it again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}", error.status) from None
    ids_S = _padded(tensors["expert_ids_S"])
    experts_SR = {}
    for name in experts.PARTS:
        table_SX = tensors[f"{name}_SR"]
        padding = [(0, ids_S.size - len(table_SX)), (0, 0), (0, 0)]
        experts_SR[name] = sharding.put(np.pad(table_SX, padding), *experts.AXES)
    return StoredMemory(router, sharding.put(ids_S), experts_SR, description["backbone"])


def _check_values(name: str, tensor: np.ndarray, memory: MemoryConfig) -> None:
    """Raises ValueError unless ids are of experts of this memory, ascending, and rows are finite numbers."""
    dtype = np.int32 if name == "expert_ids_S" else jnp.dtype(memory.dtype)
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; expected {np.dtype(dtype)}")
    if name != "expert_ids_S" and not np.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if name == "expert_ids_S" and np.any(np.diff(tensor, prepend=-1, append=memory.num_experts) <= 0):
        raise ValueError(f"{name} are not ids of experts, ascending")


def save_export(directory: Path, config: Config, memory: StoredMemory, expert_ids: np.ndarray | None = None) -> int:
    """Writes a memory, or only these of its experts, into a directory; returns how many experts were written."""
    ids_S = np.asarray(memory.expert_ids_S)
    kept_S = ids_S != EMPTY_SLOT
    if expert_ids is not None:
        kept_S &= np.isin(ids_S, expert_ids)
    arrays, record = routers.save(memory.router)
    tensors = {
        **arrays,
        "expert_ids_S": ids_S[kept_S],
        **{f"{name}_SR": np.asarray(table_SX)[kept_S] for name, table_SX in memory.experts_SR.items()},
    }
    description = {
        "config": dataclasses.asdict(config),
        "backbone": memory.fingerprint,
        "router": record,
        "experts": int(kept_S.sum()),
    }
    save_file(tensors, directory / _TENSORS)
    (directory / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    return description["experts"]


def adapter_fn(model: FrozenModel, memory: StoredMemory, config: Config) -> AdapterFn:
    """A memory as adapters of the backbone. Raises UserError if it was tuned with another one."""
    if memory.fingerprint != model.fingerprint:
        raise UserError(
            f"this memory was made for another backbone (fingerprint {memory.fingerprint}) "
            f"than {config.backbone.path or 'the one that ships'} ({model.fingerprint})"
        )

    def fetch(expert_ids_BK):
        return _gather_trained(memory.expert_ids_S, memory.experts_SR, expert_ids_BK)

    return with_experts(model, memory.router, fetch, config)


def with_experts(model: FrozenModel, router: routers.Router, fetch, config: Config) -> AdapterFn:
    """Lamini-1: every question selects its experts, and `fetch(expert_ids_BK) -> rows_BKR` reads only those."""

    def select(prompt_BT, length_B):
        return routers.select(router, model, prompt_BT, length_B, config.memory.top_k)

    return AdapterFn(select, builder(fetch, config))


def builder(fetch, config: Config) -> Callable[[routers.Selection], Adapters]:
    """Makes the adapters of a selection, with `fetch` as in `with_experts`."""
    target, positions = config.memory.target, config.memory.positions

    def build(selection):
        adapter = _adapter(fetch(selection.expert_ids_BK), selection.gates_BK, target)
        return adapters(adapter, positions, selection)

    return build


def rows_to_bytes(experts_XR: dict[str, np.ndarray]) -> list[bytes]:
    """Rows as files keep them: the numbers of each part, one part after the other."""
    parts = [np.ascontiguousarray(experts_XR[name]).reshape(len(experts_XR[name]), -1) for name in experts.PARTS]
    return [row.tobytes() for row in np.concatenate(parts, axis=1)]


def rows_from_bytes(rows: Sequence[bytes], shape: experts.ExpertShape, dtype: str) -> dict[str, np.ndarray]:
    """The inverse; zeros for an empty one. Raises ValueError for one of another size."""
    table = np.zeros((len(rows), shape.floats), jnp.dtype(dtype))
    for place, row in enumerate(rows):
        if row:
            table[place] = np.frombuffer(row, table.dtype)
    first = shape.layers * shape.input_width
    parts = zip(experts.PARTS, (table[:, :first], table[:, first:]), strict=True)
    return {name: part.reshape(shape.parts(len(rows))[name]) for name, part in parts}


def adapters(adapter: Adapter, positions: str, selection: Any = None) -> Adapters:
    """The experts' adapter, where `memory.positions` says that it acts."""
    field = {"all": "suffix", "answer": "answer"}[positions]
    return Adapters(**{field: adapter}, selection=selection)


_gather_trained = jax.jit(experts.gather_trained)
_adapter = jax.jit(experts.adapter, static_argnums=2)


def _padded(ids_S: np.ndarray) -> np.ndarray:
    """Ids, padded with EMPTY_SLOT so that shards are equal and there is at least one: an empty table has no rows."""
    padding = sharding.round_up(max(1, ids_S.size), "experts") - ids_S.size
    return np.pad(ids_S, (0, padding), constant_values=EMPTY_SLOT)


def _description(directory: Path) -> dict[str, Any]:
    path = directory / _DESCRIPTION
    if not path.is_file():
        raise UserError(f"--memory={directory}: has no {_DESCRIPTION}; python -m lamini_jax.export writes one")
    description = json_file.read(path)
    for name, kind in {"backbone": str, "router": dict, "experts": int}.items():
        if type(description.get(name)) is not kind:
            raise UserError(f'{path}: is not the description of a memory ("{name}"); export it again')
    return description


def _config(path: Path, description: dict[str, Any]) -> Config:
    """The config in a description, which may say where the backbone is now."""
    try:
        kind = RouterConfig(kind=str(description["config"]["router"]["kind"]))
        lacking = _settings(identity(Config(router=kind))) - _settings(description["config"]) - {"tuning.epochs"}
        if lacking:
            raise UserError(f"it lacks {min(lacking)}, as those of older versions do; tune again")
        config = from_config_dict(description["config"])
        if "where" in description:
            backbone = dataclasses.replace(config.backbone, path=str(description["where"]["backbone"]))
            config = dataclasses.replace(config, backbone=backbone)
        experts.check_target(config.memory.target)
        routers.KINDS[config.router.kind]
        LOOKUPS[config.router.lookup].check(config.memory.num_experts, config.router.key_dim)
        return config
    except (UserError, AttributeError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: does not hold a config ({shown(str(error))})") from None


def _settings(values: dict[str, Any]) -> set[str]:
    """The names of a config's fields."""
    return {name for name, _ in cli.flatten(values)}
