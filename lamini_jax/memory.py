"""Tuned memory to answer with: read from a finished run, or from a directory that `lamini_jax.export` wrote.

It holds the rows that facts have trained and no others: all others add nothing. A memory belongs to the weights that it
was tuned beside, which their fingerprint shows.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lamini_jax import bank, checkpoint, model, recall, router, row_optimizer, sharding
from lamini_jax.config import Config, from_config_dict
from lamini_jax.errors import UserError

_DESCRIPTION, _TENSORS = "memory.json", "memory.safetensors"


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a question needs beside the backbone."""

    routing: router.Router
    expert_ids_S: jax.Array  # ascending
    rows_SR: dict[str, jax.Array]
    fingerprint: str  # of the backbone


def config_of_run(directory: Path) -> Config:
    """The config of a run that has finished. Raises UserError if none has."""
    if not (directory / "results.json").is_file() or not (directory / "config.json").is_file():
        message = "has no finished checkpoint; finish python -m lamini_jax.tune in it first"
        raise UserError(f"--workdir={directory}: {message}")
    return _config(directory / "config.json", json.loads((directory / "config.json").read_text()))


def of_run(config: Config, directory: Path) -> Memory:
    """The memory in the checkpoints of a finished run."""
    saved = checkpoint.Checkpoints(directory).latest() if directory.is_dir() else None
    if saved is None:
        raise UserError(f"{directory}: has no finished checkpoint; finish python -m lamini_jax.tune first")
    saved_ids_S = saved.arrays["expert_ids_S"]
    ids_S = _padded(np.sort(saved_ids_S[saved_ids_S != row_optimizer.NONE]))
    shape = bank.row_shape(config.backbone, config.memory)
    down_SMI, up_SMO = row_optimizer.rearranged(saved.tables["rows"], saved_ids_S, ids_S, shape)
    rows_SR = {"down": down_SMI, "up": up_SMO}
    routing = restored_router(config, saved.arrays, saved.extra)
    return Memory(routing, sharding.put(ids_S), rows_SR, saved.extra.get("backbone", ""))


def config_of_export(directory: Path) -> Config:
    """The config of an exported memory. Raises UserError if there is none."""
    return _config(directory / _DESCRIPTION, _description(directory))


def of_export(config: Config, directory: Path) -> Memory:
    """An exported memory. Raises UserError if it is damaged."""
    path, extra = directory / _TENSORS, _description(directory)
    shape, width = bank.row_shape(config.backbone, config.memory), config.backbone.width
    expected = {f"{name}_rows_SR": part for name, part in shape.parts(extra["experts"]).items()}
    expected |= {"expert_ids_S": (extra["experts"],)}
    expected |= {"mean_D": (width,), "transform_DC": (width, config.router.key_width)}
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export it again") from None
    for name, part in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: has no tensor {name}; export it again")
        if tensors[name].shape != part:
            raise UserError(f"{path}: {name} has shape {tensors[name].shape}; expected {part}")
    ids_S = _padded(tensors["expert_ids_S"])
    rows_SR = {}
    for name in bank.PARTS:
        kept_SX = tensors[f"{name}_rows_SR"]
        room = [(0, ids_S.size - len(kept_SX)), (0, 0), (0, 0)]
        rows_SR[name] = sharding.put(np.pad(kept_SX, room), *bank.ROWS)
    return Memory(restored_router(config, tensors, extra), sharding.put(ids_S), rows_SR, extra["backbone"])


def write(directory: Path, config: Config, memory: Memory, expert_ids: np.ndarray | None = None) -> int:
    """Writes a memory, or of its experts these alone, into a directory; returns how many experts."""
    ids_S = np.asarray(memory.expert_ids_S)
    kept_S = ids_S != row_optimizer.NONE
    if expert_ids is not None:
        kept_S &= np.isin(ids_S, expert_ids)
    tensors = {
        "expert_ids_S": ids_S[kept_S],
        "mean_D": np.asarray(memory.routing.mean_D),
        "transform_DC": np.asarray(memory.routing.transform_DC),
        **{f"{name}_rows_SR": np.asarray(rows_SX)[kept_S] for name, rows_SX in memory.rows_SR.items()},
    }
    description = {
        "config": dataclasses.asdict(config),
        "backbone": memory.fingerprint,
        "keys": key_checksum(memory.routing),
        "experts": int(kept_S.sum()),
    }
    save_file(tensors, directory / _TENSORS)
    (directory / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    return description["experts"]


def adapt_with(base: model.Base, memory: Memory, config: Config) -> recall.Adapt:
    """Memory beside the backbone. Raises UserError if it was tuned beside another."""
    if memory.fingerprint != base.fingerprint:
        raise UserError(
            f"this memory was made for another backbone (fingerprint {memory.fingerprint}) "
            f"than {config.backbone.path or 'the one that ships'} ({base.fingerprint})"
        )

    def fetch(ids_BK):
        return _gather_trained(memory.expert_ids_S, memory.rows_SR, ids_BK)

    return recall.with_memory(base, memory.routing, fetch, config.memory)


def key_checksum(routing: router.Router) -> int:
    """A number that tells keys apart."""
    rows = None if routing.lookup == "product" else routing.num_experts
    return checkpoint.checksum(routing.keys, rows)


def restored_router(config: Config, arrays: dict[str, np.ndarray], extra: dict[str, Any]) -> router.Router:
    """The router that was saved; its keys are made from the seed again. Raises UserError if they came out others."""
    routing = router.make(config, arrays["mean_D"], arrays["transform_DC"])
    checkpoint.verify(key_checksum(routing), extra["keys"])
    return routing


_gather_trained = jax.jit(bank.gather_trained)


def _padded(ids_S: np.ndarray) -> np.ndarray:
    """Ids with as many more, that are none, as the shards need: one at least, since nothing can be read of nothing."""
    room = sharding.padded(max(1, ids_S.size), "experts") - ids_S.size
    return np.pad(ids_S, (0, room), constant_values=row_optimizer.NONE)


def _description(directory: Path) -> dict[str, Any]:
    path = directory / _DESCRIPTION
    if not path.is_file():
        raise UserError(f"--memory={directory}: has no {_DESCRIPTION}; python -m lamini_jax.export writes one")
    try:
        description = json.loads(path.read_text())
        if not isinstance(description["backbone"], str):
            raise TypeError("backbone")
        return {**description, **{name: int(description[name]) for name in ("keys", "experts")}}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no description of a memory ({error}); export it again") from None


def _config(path: Path, description: dict[str, Any]) -> Config:
    try:
        return from_config_dict(description["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no config ({error})") from None
