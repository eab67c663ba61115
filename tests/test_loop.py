"""The loop over epochs: which facts it trains, when it ends, what it knows of them, and that it may stop anywhere."""

import contextlib
import dataclasses
import math

import helpers
import numpy as np
import pytest
from helpers import FACTS

from lamini_jax.backbone import answering
from lamini_jax.evaluation import recall
from lamini_jax.training import loop
from lamini_jax.training.method import Losses
from lamini_jax.training.run import Tuned

EVERY = list(range(len(FACTS)))


def recording(method, steps):
    """`method`, which notes the facts of each of its steps."""
    (examples,) = method.data.examples

    def step(model, state, facts, index_B):
        steps.append(sorted(examples.index_F[index_B[index_B >= 0]].tolist()))
        return method.step(model, state, facts, index_B)

    return dataclasses.replace(method, step=step)


def begin(method, epochs):
    """What `loop.epochs` takes, with this budget."""
    return helpers.with_budget(method, epochs), method.init(), loop.new_progress(len(FACTS))


def test_training_until_all_hold(method):
    """Certified facts are spared between two checks, and it ends early with all of them certified and recalled."""
    steps, after = [], []
    method, state, progress = begin(recording(method, steps), 200)
    for now, _ in loop.epochs(method, state, progress, until_all_hold=True):
        state = now
        if progress.batches == 0:
            after.append((progress.worst_F < math.log(2), sorted(sum(steps, []))))
            steps.clear()
    assert after.pop()[1] == []  # the last check trains nothing
    assert 5 < progress.epoch == len(after) < 100
    assert (progress.worst_F < math.log(2)).all() and recall.recalled(*method.adapter(state), FACTS)[0].all()
    assert len(progress.loss) == len(progress.certified) == len(progress.seconds) == progress.epoch
    assert progress.loss[-1] < progress.loss[0] / 10
    spared = 0
    for epoch in range(1, progress.epoch):
        certified_F = after[epoch - 1][0]
        if epoch % loop.CHECK_EVERY and not certified_F.all():
            assert after[epoch][1] == np.flatnonzero(~certified_F).tolist()
            spared += certified_F.sum()
    assert spared > 0


def test_what_was_asked_last_is_kept_until_the_next_step(method):
    """A run that ends with asking every fact keeps what it heard; one that trains on afterwards forgets it."""
    *_, (state, progress) = loop.epochs(*begin(method, 200), until_all_hold=True)
    model, adapter_fn = method.adapter(state)
    tuned = Tuned(FACTS, progress, model, answering.BARE, progress.worst_F < math.log(2))
    assert tuned.recalled()[1] == recall.recalled(model, adapter_fn, FACTS)[1] and tuned.recalled()[0].all()
    for _, progress in loop.epochs(*begin(method, 50)):
        if progress.epoch == progress.full_recall and not progress.batches:
            assert recall.exact(progress.generated, FACTS).all()
    tuned = Tuned(FACTS, progress, model, answering.BARE, progress.worst_F < math.log(2))
    assert progress.full_recall < progress.epoch and not tuned.recalled()[0].any()  # the bare backbone is asked


def test_facts_that_decoding_denies_are_trained_on(method, monkeypatch):
    """A certificate is not enough: what is not recalled is trained again, alone, until the budget is spent."""
    state, progress = helpers.train(method, 30)
    assert (progress.worst_F < math.log(2)).all()
    progress.loss.clear()
    monkeypatch.setattr(loop.recall, "recalled", lambda model, adapter_fn, facts: (np.arange(len(facts)) != 7, []))
    steps = []
    list(loop.epochs(recording(helpers.with_budget(method, 4), steps), state, progress, until_all_hold=True))
    assert steps == [[7]] * 4
    assert progress.epoch == 4


def test_what_a_check_finds_undone_is_counted(method, monkeypatch):
    """Three facts that each step certifies and each check finds lost; what never was certified cannot be lost."""
    (examples,) = method.data.examples

    def losses(model, state, facts, index_B):
        worst_B = np.where(np.isin(examples.index_F[index_B], [3, 5, 8]), 5.0, 0.1)
        return Losses(worst_B, worst_B, worst_B < 1)

    def step(model, state, facts, index_B):
        return state, Losses(*(np.full(index_B.size, value) for value in (0.1, 0.1, True)))

    monkeypatch.setattr(loop.recall, "recalled", lambda model, adapter_fn, facts: (np.ones(len(facts), bool), []))
    method, state, progress = begin(dataclasses.replace(method, step=step, losses=losses), 6)
    list(loop.epochs(method, state, progress, until_all_hold=True))
    assert progress.epoch == 6
    assert progress.lost == 3 * 6  # the first check looks at facts that nobody has seen yet, and the last one counts


def test_a_study_trains_on_all_facts_and_notes_the_first_full_recall(method):
    steps = []
    method, state, progress = begin(recording(method, steps), 30)
    list(loop.epochs(method, state, progress))
    assert sorted(sum(steps, [])) == sorted(EVERY * 30)
    assert progress.epoch == 30 and 5 < progress.full_recall < 30


def test_every_step_and_every_epoch_is_yielded(method):
    """Three steps an epoch, counted; the epoch's end; the last check."""
    counts = [(progress.batches, progress.steps, progress.epoch) for _, progress in loop.epochs(*begin(method, 2))]
    assert counts == [(1, 1, 0), (2, 2, 0), (3, 3, 0), (0, 3, 1), (1, 4, 1), (2, 5, 1), (3, 6, 1), (0, 6, 2), (0, 6, 2)]


@pytest.mark.parametrize("until_all_hold", [False, True])
@pytest.mark.parametrize("steps", [3, 4, 6, 17])
def test_closed_after_any_step_it_continues_to_the_same_bits(method, until_all_hold, steps):
    """Its progress then knows the losses of every step; at the end it is that of a run which nobody stopped."""
    *_, (expected, whole) = loop.epochs(*begin(method, 8), until_all_hold)
    method, state, progress = begin(method, 8)
    with contextlib.closing(loop.epochs(method, state, progress, until_all_hold)) as epochs:
        state = next(state for state, _ in epochs if progress.steps == steps)
    assert progress.batches > 0
    *_, (state, _) = loop.epochs(method, state, progress, until_all_hold)
    assert helpers.same_bits(state, expected)
    for name in ("total_F", "worst_F", "likeliest_F", "active_F", "loss", "certified", "full_recall", "lost", "steps"):
        np.testing.assert_array_equal(getattr(progress, name), getattr(whole, name), name)
