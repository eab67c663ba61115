"""A whole run: facts in, a tuned memory or baseline out, saved as it goes and resumed where it was stopped."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, certified_loss
from lamini_jax.data.facts import Fact
from lamini_jax.errors import OTHER_RUN, PREEMPTED, UserError
from lamini_jax.evaluation import recall
from lamini_jax.memory import routers
from lamini_jax.memory.routers import FactSelection, Router
from lamini_jax.runtime import checkpointing, processes
from lamini_jax.training import loop
from lamini_jax.training.dense_methods import LoraMethod
from lamini_jax.training.loop import Progress
from lamini_jax.training.memory_method import MemoryMethod
from lamini_jax.training.method import TrainMethod


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of a run."""

    facts: Sequence[Fact]
    progress: Progress
    model: FrozenModel
    adapter_fn: AdapterFn
    certified_F: np.ndarray  # which facts are certified, by the losses measured last
    expert_ids_FK: np.ndarray | None = None  # of memory tuning

    def recalled(self) -> tuple[np.ndarray, list[str]]:
        """Which facts decoding returns, and what it returns; asked only if training did not end with asking them."""
        generated = self.progress.generated
        if generated is None:
            return recall.recalled(self.model, self.adapter_fn, self.facts)
        return recall.exact(generated, self.facts), generated


class Run:
    """The training of a method, with checkpoints in its directory, resumed from the newest of them.

    `for progress in run.epochs(): ...` may look at the model after each epoch (`run.answerer()`); `run.result()`
    completes the training and returns its result.
    """

    def __init__(
        self,
        method: TrainMethod,
        directory: Path,
        title: str,
        until_all_hold: bool = False,
        saved: checkpointing.Saved | None = None,
        patient: bool = False,
    ):
        """`saved` is the newest checkpoint in the directory, if the caller has read it already.

        A `patient` run saves only what has taken longer than a save is worth: its caller keeps the result.
        """
        self.method, self._title, self._until_all_hold, self._patient = method, title, until_all_hold, patient
        self._checkpoints = checkpointing.Checkpoints(directory, patient)
        self._ended, saved = False, saved or self._checkpoints.latest()
        if saved is None:
            self.progress, self.state = loop.new_progress(len(method.facts)), method.init()
        else:
            _check_backbone(saved, method.model, directory)
            self.progress = Progress(**saved.arrays["progress"], **saved.record["progress"])
            self.state = method.restore(saved)
        self._checkpoints.check_room(method.save(self.state)[0])

    def epochs(self) -> Iterator[Progress]:
        """The progress after each epoch. Raises UserError (PREEMPTED) after a SIGTERM, when all is saved."""
        epoch, budget, stopped = self.progress.epoch, self.method.config.tuning.epochs, False
        bar = processes.progress_bar(total=budget, initial=epoch, desc=self._title, unit="epoch")
        steps = loop.epochs(self.method, self.state, self.progress, self._until_all_hold)
        with processes.preemption_guard(), bar:
            with contextlib.closing(steps):
                for self.state, progress in steps:
                    if progress.batches:
                        if stopped := processes.preempted(progress.steps):
                            break
                    elif progress.epoch > epoch:
                        epoch = progress.epoch
                        bar.set_postfix_str(self._counts(), refresh=False)
                        bar.update()
                        yield progress
                        if self._checkpoints.due():
                            self._save()
                bar.set_postfix_str(self._counts())
            if not self._patient or self.progress.batches or self._checkpoints.due():
                self._save()
            self._checkpoints.close()
        # A smaller budget than before may end a run in the middle of an epoch, which is no reason to go on.
        if stopped:
            where = f"in epoch {epoch + 1}, after {self.progress.steps} steps"
            raise UserError(f"terminated {where}, which are saved: run again to continue", status=PREEMPTED)
        self._ended = True

    def answerer(self) -> tuple[FrozenModel, AdapterFn]:
        """The model as it is now, to answer questions with until training continues."""
        return self.method.adapter(self.state)

    def result(self) -> Tuned:
        """Completes the training and returns its result."""
        if not self._ended:
            for _ in self.epochs():
                pass
        certified_F = self.progress.worst_F < certified_loss(self.method.config.backbone.dtype)
        selection = getattr(self.method, "selection", None)
        expert_ids_FK = None if selection is None else selection.expert_ids_FK
        return Tuned(self.method.facts, self.progress, *self.answerer(), certified_F, expert_ids_FK)

    def _counts(self) -> str:
        loss = f"loss {self.progress.loss[-1]:.4f}, " if self.progress.loss else ""
        held_F = self.progress.worst_F < certified_loss(self.method.config.backbone.dtype)
        return f"{loss}{held_F.sum()} of {held_F.size} certified"

    def _save(self) -> None:
        tables, arrays, record = self.method.save(self.state)
        arrays["progress"], record["progress"] = self.progress.save()
        self._checkpoints.save(self.progress.steps, tables, arrays, record)


def memory_run(
    config: Config,
    model: FrozenModel,
    facts: Sequence[Fact],
    directory: Path,
    title: str,
    router: Router | None = None,
    until_all_hold: bool = False,
) -> Run:
    """Memory tuning of some facts (section 7.1), with a router trained for them unless one is given.

    A run that is resumed keeps the router and the selection that it began with.
    """
    saved = checkpointing.Checkpoints(directory).latest()
    if saved is not None:
        _check_backbone(saved, model, directory)
        router = routers.restore(config, saved.arrays, saved.record["router"])
        selection = FactSelection(router, saved.arrays["expert_ids_FK"], saved.arrays["gates_FK"])
    else:
        questions = [fact.question for fact in facts]
        router = router or routers.train(config, model, questions)
        selection = routers.select_facts(model, router, questions, config.memory.top_k)
    method = MemoryMethod.create(config, model, facts, selection)
    return Run(method, directory, title, until_all_hold, saved)


def lora_run(
    config: Config, model: FrozenModel, facts: Sequence[Fact], directory: Path, title: str, until_all_hold: bool = False
) -> Run:
    """The baseline: one LoRA on every linear layer."""
    return Run(LoraMethod.create(config, model, facts), directory, title, until_all_hold)


def _check_backbone(saved: checkpointing.Saved, model: FrozenModel, directory: Path) -> None:
    if saved.record["backbone"] != model.fingerprint:
        reason = f"was tuned with another backbone (fingerprint {saved.record['backbone']})"
        raise UserError(f"{directory}: {reason}", OTHER_RUN)
