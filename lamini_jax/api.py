"""The Python API: tune a memory on facts, load and ask it, load a backbone. The commands are thin wrappers of it."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lamini_jax.backbone import checkpoints, frozen_model, transformer
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import BackboneConfig, Config, identity, to_config_dict
from lamini_jax.config import facts as facts_config
from lamini_jax.data import facts as facts_lib
from lamini_jax.data.facts import Fact
from lamini_jax.errors import UserError
from lamini_jax.fact_memory import Change, FactMemory, ListedFact, listed
from lamini_jax.memories import ExpertMemory, Memory
from lamini_jax.memory import scope, storage, store
from lamini_jax.memory.store import FactStore
from lamini_jax.runtime import checkpointing, paths, workdir

Facts = facts_lib.Facts


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory that holds a memory, and its config, which is known before anything large is read."""

    directory: Path
    config: Config
    is_export: bool

    def with_backbone(self, path: str | None) -> "Source":
        """The same memory with its backbone at another path. Raises UserError for a backbone of another shape."""
        if path is None:
            return self
        known = self.config.backbone
        free = {name: getattr(known, name) for name in ("max_seq_len", "dtype", "system")}
        found = checkpoints.resolve(BackboneConfig(path=path, **free))
        if dataclasses.replace(found, path=known.path) != known:
            raise UserError(f"--backbone={path}: this memory was made for another backbone, of another shape")
        return dataclasses.replace(self, config=dataclasses.replace(self.config, backbone=found))

    def load(self, lookup: str | None = None) -> Memory:
        """The memory, with its backbone. Raises UserError if it is damaged, or was tuned with other weights."""
        router = self.config.router
        if lookup not in (None, "approximate"):
            raise UserError(f"--lookup={lookup}: must be approximate")
        if lookup is not None and (router.kind, router.lookup) != ("experts", "exact"):
            raise UserError(
                f"--lookup={lookup}: this memory was tuned with a {router.kind} router, {router.lookup} keys"
            )
        model = frozen_model.load(self.config)
        if router.kind == "facts":
            return FactMemory(self.config, model, self.directory)
        if self.is_export:
            stored = storage.load_export(self.config, self.directory)
        else:
            result = _read_result(self.directory / "results.json")
            if result.holding < result.facts:
                lacking = f"{result.facts - result.holding} of {result.facts} facts of this memory do not hold"
                logging.warning("%s: %s; tune further", self.directory, lacking)
            stored = storage.load_run(self.config, self.directory / "checkpoints", result.step)
        if lookup is not None:
            stored = dataclasses.replace(stored, router=stored.router.replace(lookup=lookup))
        return ExpertMemory(self.config, model, stored)


def run_source(directory: str | os.PathLike) -> Source:
    """The memory in a work directory of `tune`. Raises UserError if no run has finished there."""
    directory = paths.as_path(directory)
    return Source(directory, storage.run_config(directory), is_export=False)


def export_source(directory: str | os.PathLike) -> Source:
    """The memory that `lamini_jax.export` wrote. Raises UserError if there is none."""
    directory = paths.as_path(directory)
    if not storage.is_export(directory) and (directory / store.NAME).is_file():  # of facts: it is a work directory too
        return run_source(directory)
    return Source(directory, storage.export_config(directory), is_export=True)


def load(directory: str | os.PathLike, backbone: str | None = None, lookup: str | None = None) -> Memory:
    """The memory in a work directory of `tune`, or in one that `lamini_jax.export` wrote.

    `backbone` is where the backbone's checkpoint is, if it has moved; `lookup="approximate"` finds experts faster on a
    TPU and misses some. Raises UserError if there is no finished memory, or another backbone.
    """
    find = export_source if storage.is_export(paths.as_path(directory)) else run_source
    return find(directory).with_backbone(backbone).load(lookup)


def list_facts(directory: str | os.PathLike, search: str = "") -> list[ListedFact]:
    """The facts of a memory, without reading anything else of it."""
    facts = FactStore(paths.as_path(directory))
    with contextlib.closing(facts):
        return listed(facts, search)


def load_backbone(path: str = "", dtype: str = "float32", max_seq_len: int = 256) -> tuple[BackboneConfig, Any]:
    """The config and the parameters of a checkpoint, for `logits(config, params, tokens_BT)`.

    `path` is a directory in a format that backbone/checkpoints reads, or a name on the Hub; empty: the tiny backbone
    that ships.
    """
    return checkpoints.load_whole(path, dtype, max_seq_len)


logits = transformer.logits


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """The result of tuning, which is also in the work directory's results.json."""

    facts: int
    holding: int  # certified and recalled
    recalled: int
    certified: int
    epochs: int
    seconds: float
    step: int  # of the checkpoint that this describes


def tune(facts: Facts, directory: str | os.PathLike, config: Config | None = None) -> Change | TuneResult:
    """Tunes a memory until every fact is certified and recalled exactly, or the budget of epochs ends.

    `facts` is a JSONL file or mappings with "question" and "answer", and perhaps other wordings ("also"). Facts are
    added to the memory that is in the directory, or change it. With another kind of router than `facts`, a directory
    belongs to its facts: it gets checkpoints, recall.jsonl (what the model really answers to every question) and
    results.json; called again, tuning continues where it was stopped. Raises UserError for bad facts, or for a
    directory of another run.
    """
    from lamini_jax.configure import configure  # here, so that answering imports no training

    config = configure(to_config_dict(config or facts_config()))
    if config.router.kind == "facts":
        return open_memory(directory, config).add(read_facts(facts, config))
    return tune_once(facts, directory, config)


def open_memory(directory: str | os.PathLike, config: Config) -> FactMemory:
    """The memory of facts in a directory, to change it; an empty one if there is none.

    Raises UserError for a directory of another backbone or of other settings than those of tuning.
    """
    if directory:
        storage.check_complete(paths.as_path(directory))
    model = frozen_model.load(config)
    scope.load(model.fingerprint).judge.threshold(config.router.false_fires)  # before anything is made
    belongs_to = {"config": identity(config), "weights": model.fingerprint}
    directory = workdir.open_workdir(directory, belongs_to, {"backbone": config.backbone.path})
    return FactMemory(config, model, directory, create=True)


def tune_once(facts: Facts, directory: str | os.PathLike, config: Config) -> TuneResult:
    """`tune` with the paper's router, which is trained for these facts."""
    facts = read_facts(facts, config)
    model = frozen_model.load(config)
    where = {"backbone": config.backbone.path}
    directory = workdir.open_workdir(directory, run_identity(config, facts, model.fingerprint), where)
    with workdir.alone(directory):
        return _tune(config, model, facts, directory)


def _tune(config: Config, model: FrozenModel, facts: list[Fact], directory: Path) -> TuneResult:
    """`tune` in a work directory that belongs to this run."""
    from lamini_jax import training  # here, so that answering imports no training

    previous = directory / "results.json"
    if previous.exists():
        result = _read_result(previous)
        newest = checkpointing.Checkpoints(directory / "checkpoints").latest_step()
        if result.holding == len(facts) and result.step == newest:
            return result
    started, title = time.time(), f"tuning {len(facts)} facts"
    run = training.memory_run(config, model, facts, directory / "checkpoints", title, until_all_hold=True)
    tuned = run.result()
    recalled_F, generated = tuned.recalled()
    _write_recall(directory / "recall.jsonl", tuned, recalled_F, generated)
    result = TuneResult(
        facts=len(facts),
        holding=int((recalled_F & tuned.certified_F).sum()),
        recalled=int(recalled_F.sum()),
        certified=int(tuned.certified_F.sum()),
        epochs=tuned.progress.epoch,
        seconds=round(time.time() - started, 1),
        step=tuned.progress.steps,
    )
    workdir.write_json(previous, dataclasses.asdict(result))
    return result


def read_facts(facts: Facts, config: Config, may_be_empty: bool = False) -> list[Fact]:
    """Facts that the backbone of this config can represent. Raises UserError, saying where, for one that it cannot."""
    arguments = checkpoints.load_tokenizer(config.backbone), config.backbone.max_seq_len
    found = facts_lib.read(facts, *arguments, may_be_empty)
    if config.router.kind == "facts":
        from lamini_jax import edits  # here, so that answering imports no training

        edits.check_wordings(found)
    return found


def run_identity(config: Config, facts: Sequence[Fact], weights: str) -> dict[str, Any]:
    """What a work directory belongs to: facts, weights, and `config.identity` without the budget of epochs."""
    values = identity(config)
    del values["tuning"]["epochs"]
    return {"config": values, "facts": facts_lib.fingerprint(facts), "weights": weights}


def _read_result(path: Path) -> TuneResult:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise TypeError("not an object")
        for field in dataclasses.fields(TuneResult):
            if type(values.get(field.name)) not in (int, field.type):
                raise TypeError(f'"{field.name}" is not a number')
        return TuneResult(**values)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: is no result of tune ({error}); remove it and run python -m lamini_jax.tune"
        ) from None


def _write_recall(path: Path, tuned, recalled_F: np.ndarray, generated: Sequence[str]) -> None:
    lines = [
        {
            "question": fact.question,
            "answer": fact.answer,
            "generated": text,
            "exact": bool(exact),
            "certified": bool(certified),
            "worst_token_loss": float(worst),
        }
        for fact, text, exact, certified, worst in zip(
            tuned.facts, generated, recalled_F, tuned.certified_F, tuned.progress.worst_F, strict=True
        )
    ]
    workdir.write_json_lines(path, lines)
