"""The loop over epochs, one for every `TrainMethod`: a generator of progress, whose caller decides when to stop."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lamini_jax.config import certified_loss
from lamini_jax.data import batches
from lamini_jax.evaluation import recall
from lamini_jax.runtime import sharding
from lamini_jax.training.method import Losses, TrainMethod

# Epochs between two checks of the facts that tuning skips: they share experts with those that it still trains.
CHECK_EVERY = 5
_PER_FACT = ("total_F", "worst_F", "likeliest_F", "active_F")


@dataclasses.dataclass
class Progress:
    """How far training is: what a resumed run needs apart from the trained state. Losses are the last known ones."""

    total_F: np.ndarray  # the loss of each fact, as in `Losses`
    worst_F: np.ndarray
    likeliest_F: np.ndarray
    active_F: np.ndarray  # which facts the current epoch trains
    loss: list[float] = dataclasses.field(default_factory=list)  # per epoch, nats per answer token
    certified: list[int] = dataclasses.field(default_factory=list)  # per epoch, facts
    seconds: list[float] = dataclasses.field(default_factory=list)  # per epoch
    full_recall: int | None = None  # the first epoch after which every fact was recalled
    lost: int = 0  # times that a check found a fact no longer certified, because others have trained its experts
    steps: int = 0
    batches: int = 0  # trained in the current epoch; 0: between two epochs
    generated: list[str] | None = None  # what decoding returned for every fact, if nothing was trained since; not saved

    @property
    def epoch(self) -> int:
        return len(self.loss)

    def save(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Its arrays, and the rest, which is kept as JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["generated"]
        return {name: fields.pop(name) for name in _PER_FACT}, fields


def new_progress(num_facts: int) -> Progress:
    """The progress of a run that has not begun."""
    unknown_F = np.full(num_facts, np.inf, np.float32)
    return Progress(unknown_F, unknown_F.copy(), np.zeros(num_facts, bool), np.ones(num_facts, bool))


def epochs(
    method: TrainMethod, state: Any, progress: Progress, until_all_hold: bool = False
) -> Iterator[tuple[Any, Progress]]:
    """Trains from `progress` on until the budget of epochs is spent; yields after every step and epoch.

    Within an epoch `progress.batches` says how many of its steps are done; after it, it is 0. A caller that stops early
    closes the generator, and may continue later from the state and the progress that were yielded last. At the end, all
    facts have been checked, and state and progress are yielded once more.

    With `until_all_hold`, certified facts are skipped, all are checked every few epochs, and training ends as soon as
    every fact is certified and recalled by decoding.
    """
    threshold = certified_loss(method.config.backbone.dtype)
    while progress.epoch < method.config.tuning.epochs:
        started = time.perf_counter()
        if until_all_hold and progress.batches == 0 and not _choose_active(method, state, progress, threshold):
            yield state, progress
            return
        with contextlib.closing(_steps(method, state, progress)) as steps:
            for state in steps:
                if progress.batches:
                    yield state, progress
        progress.seconds.append(time.perf_counter() - started)
        progress.certified.append(int((progress.worst_F < threshold).sum()))
        progress.loss.append(float(progress.total_F.sum(dtype=np.float64) / method.data.answer_tokens))
        first_time = not until_all_hold and progress.full_recall is None and progress.likeliest_F.all()
        if first_time and _ask(method, state, progress).all():
            progress.full_recall = progress.epoch
        yield state, progress
    check(method, state, progress)
    yield state, progress


def check(method: TrainMethod, state: Any, progress: Progress) -> None:
    """Measures every fact's losses as they are now and writes them into the progress.

    Facts that were certified and are not any more are counted as lost.
    """
    threshold = certified_loss(method.config.backbone.dtype)
    held_F, pending = progress.worst_F < threshold, []
    for number, facts in enumerate(method.data.buckets):
        examples = method.data.examples[number]
        for index_B in batches.in_order(len(examples.index_F), min(method.config.tuning.batch_size, examples.rows)):
            index_B = sharding.pad_rows(index_B, "batch", fill=-1)
            pending.append((number, index_B, method.losses(method.model, state, *facts.batch(index_B))))
    _record(method, progress, pending)
    progress.lost += int((held_F & (progress.worst_F >= threshold)).sum())


def _choose_active(method: TrainMethod, state: Any, progress: Progress, threshold: float) -> bool:
    """Chooses the facts that the next epoch trains, those that do not hold; False if all of them hold."""
    if progress.epoch % CHECK_EVERY == 0 or (progress.worst_F < threshold).all():
        check(method, state, progress)
    if (progress.worst_F < threshold).all():
        recalled_F = _ask(method, state, progress)
        if recalled_F.all():
            return False
        progress.worst_F[~recalled_F] = np.inf
    progress.active_F = progress.worst_F >= threshold
    return True


def _ask(method: TrainMethod, state: Any, progress: Progress) -> np.ndarray:
    """Which facts decoding returns; the progress keeps what it returned."""
    recalled_F, progress.generated = recall.recalled(*method.adapter(state), method.facts)
    return recalled_F


def _steps(method: TrainMethod, state: Any, progress: Progress) -> Iterator[Any]:
    """The remaining steps of the current epoch; the progress has their losses when this generator ends or is closed.

    A fact's losses are those from before its step. They are read from the devices only then, so that no step waits.
    """
    config, pending, progress.generated = method.config, [], None
    examples, buckets = method.data.examples, method.data.buckets
    order = batches.epoch_batches(examples, config.tuning.batch_size, config.seed, progress.epoch, progress.active_F)
    try:
        for number, index_B in itertools.islice(order, progress.batches, None):
            index_B = sharding.pad_rows(index_B, "batch", fill=-1)
            state, losses = method.step(method.model, state, *buckets[number].batch(index_B))
            pending.append((number, index_B, losses))
            progress.steps += 1
            progress.batches += 1
            yield state
        progress.batches = 0
        yield state
    finally:
        _record(method, progress, pending)


def _record(method: TrainMethod, progress: Progress, pending: list[tuple[int, np.ndarray, Losses]]) -> None:
    # All at once: one by one, each would be waited for.
    for (number, index_B, _), losses in zip(pending, jax.device_get([losses for *_, losses in pending]), strict=True):
        valid_B = index_B >= 0
        index = method.data.examples[number].index_F[index_B[valid_B]]
        progress.total_F[index] = losses.total_B[valid_B]
        progress.worst_F[index] = losses.worst_B[valid_B]
        progress.likeliest_F[index] = losses.likeliest_B[valid_B]
