"""Memory tuning changes the rows that facts selected, and nothing else, until decoding must return every answer."""

import dataclasses
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FACTS

from lamini_jax import backbone, bank, decoding, memory, model, row_optimizer, runs, tuning
from lamini_jax.data import batches


@pytest.fixture(scope="module")
def ready(base):
    """20 facts of one length, of 8 random experts in 4,096 each; the last batch of an epoch is half empty."""
    return helpers.make_tuning(helpers.CONFIG, base, FACTS)


def copy(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def epochs(ready, state, count, log=None):
    log = log or tuning.new_log(len(FACTS))
    for _ in range(count):
        state = tuning.train_epoch(ready.method, ready.base.params, state, ready.facts, log, ready.config.tuning, 0)
        log.loss.append(0.0)
    return state, log


def step(ready, state, rows_B):
    return ready.method.step(ready.base.params, state, ready.facts.buckets[0], np.array(rows_B, np.int32))


def test_frozen_stays_frozen(ready):
    params, buckets = copy(ready.base.params), copy(ready.facts.buckets)
    state, _ = epochs(ready, ready.fresh_state(), 2)
    assert helpers.same_bits(ready.base.params, params)
    assert helpers.same_bits(ready.facts.buckets, buckets)

    before, after = helpers.flat(ready.fresh_state().rows_NR), helpers.flat(state.rows_NR)
    selected_N = np.isin(np.arange(len(before)), ready.expert_ids_FK)
    assert 100 < selected_N.sum() < 200
    assert helpers.same_bits(after[~selected_N], before[~selected_N])
    assert (after[selected_N] != before[selected_N]).any(axis=1).all()


@pytest.fixture(scope="module")
def midway(base, routing, tmp_path_factory):
    """A run that stopped when some facts were certified and some were not, and the router as it was before."""
    config = helpers.replace(helpers.CONFIG, tuning={"epochs": 9})
    directory = tmp_path_factory.mktemp("midway")
    before = copy(routing)
    tuned = runs.tune_memory(config, base, lambda: routing, FACTS, directory, "")
    assert 0 < tuned.certified_F.sum() < len(FACTS)
    return tuned, memory.of_run(config, directory), before


def test_router_stays_frozen(base, routing, midway):
    """From before tuning to what serving reads back."""
    _, served, before = midway
    assert helpers.same_bits(routing, before)
    assert helpers.same_bits(served.routing, before)
    selection_FK = model.select_all(base, routing, [fact.question for fact in FACTS], 8)
    np.testing.assert_array_equal(served.expert_ids_S, np.unique(selection_FK))


def test_a_step_moves_only_the_experts_of_its_facts(ready):
    state, _ = epochs(ready, ready.fresh_state(), 1)
    before = copy(state)
    facts_B = [3, 11, 17]
    state, _ = step(ready, state, [*facts_B, -1, -1, -1, -1, -1])
    moved_N = (helpers.flat(state.rows_NR) != helpers.flat(before.rows_NR)).any(axis=1)
    assert set(np.flatnonzero(moved_N)) == set(ready.expert_ids_FK[facts_B].ravel())
    untouched_S = ~np.isin(state.slots.expert_ids_S, ready.expert_ids_FK[facts_B])
    for now, then in zip(jax.tree.leaves(state.slots), jax.tree.leaves(before.slots), strict=True):
        assert helpers.same_bits(np.asarray(now)[untouched_S], then[untouched_S])


def test_padding_changes_nothing(ready):
    state, _ = epochs(ready, ready.fresh_state(), 1)
    before = copy(state)
    state, losses = step(ready, state, [-1] * 8)
    assert helpers.same_bits(state, before)
    assert not np.asarray(losses.total_B).any() and not np.asarray(losses.worst_B).any()
    # Where padding stands and how much of it there is does not matter.
    together, _ = step(ready, ready.fresh_state(), [5, 6, -1, -1, -1, -1, -1, -1])
    apart, _ = step(ready, ready.fresh_state(), [-1, -1, 6, -1, -1, -1, -1, 5])
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def crowded(base):
    """Facts that share experts, within a batch too; plain gradient descent, so that a step shows its gradient."""
    config = helpers.replace(
        helpers.CONFIG, memory={"num_experts": 80}, tuning={"optimizer": "sgd", "learning_rate": 1.0}
    )
    return helpers.make_tuning(config, base, FACTS)


def plain_losses(ready, rows_NR, facts_B):
    """Losses of facts (nats) from the whole model, differentiable through the gather from the whole bank."""
    (examples,) = ready.facts.examples
    decoder, params = ready.base.decoder, ready.base.params
    K = ready.expert_ids_FK.shape[1]
    rows_BKR = jax.tree.map(lambda x: x[ready.expert_ids_FK[facts_B]], rows_NR)
    adapter = bank.adapter(rows_BKR, jnp.full((len(facts_B), K), K**-0.5), ready.config.memory.target)
    hidden_BTD, _ = backbone.prefix(decoder, params, examples.tokens_FT[facts_B])
    hidden_BTD, _ = backbone.suffix(decoder, params, hidden_BTD, adapter=adapter)
    log_probabilities_BTV = jax.nn.log_softmax(backbone.unembed(decoder, params, hidden_BTD))
    targets_FT, mask_FT = next_tokens(examples)
    right_BTV = jax.nn.one_hot(targets_FT[facts_B], 256)
    return -jnp.sum(log_probabilities_BTV * right_BTV, axis=-1), mask_FT[facts_B]


def next_tokens(examples):
    """The token that each position predicts, and which of them are an answer's."""
    position_T = np.arange(examples.tokens_FT.shape[1])
    mask_FT = (position_T >= examples.prompt_length_F[:, None] - 1) & (position_T < examples.length_F[:, None] - 1)
    return np.roll(examples.tokens_FT, -1, axis=1), mask_FT


def test_experts_that_facts_share_get_the_sum_of_their_gradients(crowded):
    """The same gradient as from plain differentiation through the gather, which is as large as the bank."""
    facts_B = np.arange(8)
    assert np.unique(crowded.expert_ids_FK[facts_B]).size < 50  # of 64 selections
    rows_NR = np.random.default_rng(0).normal(size=(80, crowded.shape.floats)).astype(np.float32) / 10
    rows_NR = helpers.parts(rows_NR, crowded.shape)

    @jax.jit
    @jax.grad
    def dense_gradient(rows_NR):
        losses_BT, mask_BT = plain_losses(crowded, rows_NR, facts_B)
        return jnp.sum(jnp.sum(losses_BT * mask_BT, axis=1) / mask_BT.sum(axis=1))

    expected_NR = helpers.flat(dense_gradient(rows_NR))
    state = crowded.fresh_state().replace(rows_NR=jax.tree.map(jnp.array, rows_NR))
    state, _ = step(crowded, state, facts_B)
    found_NR = helpers.flat(rows_NR) - helpers.flat(state.rows_NR)
    np.testing.assert_allclose(found_NR, expected_NR, rtol=1e-4, atol=1e-4 * abs(expected_NR).max())
    assert abs(expected_NR).max() > 0.01


def test_losses_are_those_of_the_whole_model(ready):
    """In the log: per fact the sum, the worst, and whether greedy decoding would choose every token of the answer."""
    state, log = epochs(ready, ready.fresh_state(), 4)
    tuning.check(ready.method, ready.base.params, state, ready.facts, log, ready.config.tuning.batch_size)
    losses_FT, mask_FT = jax.jit(lambda rows_NR: plain_losses(ready, rows_NR, np.arange(len(FACTS))))(state.rows_NR)
    answers_FA = np.asarray(losses_FT)[np.asarray(mask_FT)].reshape(len(FACTS), 5)  # four symbols and the stop token
    (examples,) = ready.facts.examples
    index_F = examples.index_F
    np.testing.assert_allclose(log.total_F[index_F], answers_FA.sum(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log.worst_F[index_F], answers_FA.max(axis=1), rtol=1e-4, atol=1e-4)
    assert ready.facts.tokens == answers_FA.size
    assert log.likeliest_F.any()
    assert log.likeliest_F[log.worst_F < math.log(2)].all()
    assert not log.likeliest_F[log.worst_F > math.log(256)].any()


def test_the_certificate_is_log_two():
    assert tuning.certified_loss("float32") == math.log(2)
    assert tuning.certified_loss("bfloat16") == 0.576


def test_certified_facts_are_recalled(base, midway):
    """No certificate is wrong, in what tuning holds and in what serving reads from its checkpoint."""
    tuned, served, _ = midway
    np.testing.assert_array_equal(tuned.certified_F, tuned.log.worst_F < math.log(2))
    exact_F, generated = runs.recalled(base, tuned.adapt, FACTS)
    assert exact_F[tuned.certified_F].all()
    assert exact_F.tolist() == [text == fact.answer for text, fact in zip(generated, FACTS, strict=True)]
    assert exact_F.tolist() == tuned.log.likeliest_F.tolist()
    assert runs.recalled(base, memory.adapt_with(base, served, helpers.CONFIG), FACTS)[1] == generated


def recording(method, steps):
    """`method`, and the facts of each step in `steps`."""

    def step(params, state, bucket, rows_B):
        steps.append(sorted(rows_B[rows_B >= 0].tolist()))
        return method.step(params, state, bucket, rows_B)

    return tuning.Method(step, method.losses)


def test_tuning_until_all_hold(ready):
    """Certified facts are spared between two checks, and it ends early with all of them certified and recalled."""
    config = helpers.replace(ready.config, tuning={"epochs": 200})
    shape, log, steps, after = ready.shape, tuning.new_log(len(FACTS)), [], []

    def recalled(state):
        return state_recall(ready, state, shape)

    def after_epoch(state, log):
        after.append((log.worst_F < math.log(2), sorted(sum(steps, []))))
        steps.clear()

    method = recording(ready.method, steps)
    state = tuning.tune(
        method,
        ready.base.params,
        ready.fresh_state(),
        ready.facts,
        log,
        config,
        recalled=recalled,
        until_all_hold=True,
        after_epoch=after_epoch,
    )
    assert 5 < log.epoch == len(after) < 100
    assert (log.worst_F < math.log(2)).all() and state_recall(ready, state, shape).all()
    assert len(log.loss) == len(log.certified) == len(log.seconds) == log.epoch
    assert log.loss[-1] < log.loss[0] / 10
    (examples,) = ready.facts.examples
    spared = 0
    for epoch in range(1, log.epoch):
        certified_F = after[epoch - 1][0]
        if epoch % tuning.CHECK_EVERY and not certified_F.all():
            stepped = examples.index_F[after[epoch][1]]
            assert sorted(stepped) == np.flatnonzero(~certified_F).tolist()
            spared += certified_F.sum()
    assert spared > 0


def state_recall(ready, state, shape):
    """Which facts decoding returns, with the experts of `ready` and not a router's."""
    (prompts,) = batches.prompts([fact.question for fact in FACTS], helpers.TOKENIZER)
    gates_FK = jnp.full(ready.expert_ids_FK.shape, ready.expert_ids_FK.shape[1] ** -0.5)
    rows_FKR = jax.tree.map(lambda x: x[ready.expert_ids_FK], state.rows_NR)
    adapter = bank.adapter(rows_FKR, gates_FK, ready.config.memory.target)
    base, adapted = ready.base, decoding.Adapted(suffix=adapter)
    answer_FA, _ = decoding.generate(
        base.decoder, base.params, prompts.tokens_FT, prompts.length_F, 10, helpers.TOKENIZER.stop_ids, adapted
    )
    texts = [helpers.TOKENIZER.decode(answer_A) for answer_A in answer_FA]
    return np.array([text == fact.answer for text, fact in zip(texts, FACTS, strict=True)])


def test_facts_that_decoding_denies_are_trained_on(ready):
    """A certificate is not enough: what is not recalled is trained again, alone, until the budget is spent."""
    config = helpers.replace(ready.config, tuning={"epochs": 4})
    state, log = epochs(ready, ready.fresh_state(), 30)
    log.loss.clear()
    steps = []
    denied_F = np.arange(len(FACTS)) == 7
    tuning.tune(
        recording(ready.method, steps),
        ready.base.params,
        state,
        ready.facts,
        log,
        config,
        recalled=lambda state: ~denied_F,
        until_all_hold=True,
    )
    (examples,) = ready.facts.examples
    assert [examples.index_F[rows].tolist() for rows in steps] == [[7]] * 4
    assert log.epoch == 4


def test_what_a_check_finds_undone_is_counted(ready):
    """Three facts that each step certifies and each check finds lost; what never was certified cannot be lost."""
    (examples,) = ready.facts.examples

    def losses(params, state, bucket, rows_B):
        worst_B = np.where(np.isin(examples.index_F[rows_B], [3, 5, 8]), 5.0, 0.1)
        return tuning.Losses(worst_B, worst_B, worst_B < 1)

    def step(params, state, bucket, rows_B):
        return state, tuning.Losses(*(np.full(rows_B.size, value) for value in (0.1, 0.1, True)))

    config = helpers.replace(ready.config, tuning={"epochs": 6})
    log = tuning.new_log(len(FACTS))
    hooks = {"recalled": lambda state: np.ones(len(FACTS), bool), "until_all_hold": True}
    tuning.tune(tuning.Method(step, losses), None, None, ready.facts, log, config, **hooks)
    assert log.epoch == 6 and log.lost == 3 * 5  # the first check looks at facts that nobody has seen yet


def test_a_study_trains_on_all_facts_and_notes_the_first_full_recall(ready):
    config = helpers.replace(ready.config, tuning={"epochs": 30})
    log, steps = tuning.new_log(len(FACTS)), []
    tuning.tune(
        recording(ready.method, steps),
        ready.base.params,
        ready.fresh_state(),
        ready.facts,
        log,
        config,
        recalled=lambda state: state_recall(ready, state, ready.shape),
        until_all_hold=False,
    )
    assert sorted(sum(steps, [])) == sorted(list(range(len(FACTS))) * 30)
    assert log.epoch == 30 and 5 < log.full_recall < 30


def test_nothing_recompiles(ready, caplog):
    """After the first epoch, neither a step nor a check nor anything small between them."""
    config = helpers.replace(ready.config, tuning={"epochs": 7})
    method = helpers.make_tuning(config, ready.base, FACTS).method  # one that has compiled nothing yet
    counts = []

    def after_epoch(state, log):
        counts.append(len(helpers.compilations(caplog)))

    with jax.log_compiles():
        tuning.tune(
            method,
            ready.base.params,
            ready.fresh_state(),
            ready.facts,
            tuning.new_log(len(FACTS)),
            config,
            recalled=lambda state: np.zeros(len(FACTS), bool),
            until_all_hold=True,
            after_epoch=after_epoch,
        )
    assert {"jit(step)", "jit(losses)"} <= set(helpers.compilations(caplog)), "jax logs compilations in another way now"
    assert counts[-1] == counts[0]
    assert method.step._cache_size() == method.losses._cache_size() == len(ready.facts.buckets) == 1


def test_a_step_holds_nothing_of_the_size_of_the_bank(ready):
    """Neither for 16 times as many experts, and the bank itself is changed where it lies."""
    state, few = ready.fresh_state(), helpers.CONFIG.memory.num_experts
    analyses = {}
    for num_experts in (few, 16 * few):
        rows_NR = {
            name: jax.ShapeDtypeStruct(part, np.float32) for name, part in ready.shape.parts(num_experts).items()
        }
        arguments = ready.base.params, state.replace(rows_NR=rows_NR), ready.facts.buckets[0], np.zeros(8, np.int32)
        analyses[num_experts] = ready.method.step.lower(*arguments).compile().memory_analysis()
        assert analyses[num_experts].alias_size_in_bytes >= num_experts * ready.shape.floats * 4
    temporary = analyses[few].temp_size_in_bytes
    assert temporary > 0
    assert analyses[16 * few].temp_size_in_bytes == pytest.approx(temporary, rel=0.01)


def test_a_step_takes_its_state_over(ready):
    state = ready.fresh_state()
    step(ready, state, range(8))
    assert all(part.is_deleted() for part in state.rows_NR.values())


def test_lora_starts_at_nothing_and_learns(base):
    """The baseline: its first losses are the bare backbone's, then they fall; the backbone stays frozen."""
    config = helpers.CONFIG
    schedule = optax.linear_schedule(config.lora.learning_rate, 0.0, 8 * 3)
    tx = row_optimizer.make(config.lora.optimizer, schedule)
    state = tuning.lora_state(base.decoder, config.lora.rank, tx, np.uint32(0))
    adapters = state.adapters
    assert all(not np.asarray(low_rank.up).any() for part in adapters.values() for low_rank in part.values())
    assert all(np.asarray(low_rank.down).all() for part in adapters.values() for low_rank in part.values())
    method = tuning.lora_method(base.decoder, tx)
    examples = batches.encode(FACTS, base.tokenizer)
    facts = tuning.Facts(examples, tuning.lora_buckets(examples))
    params, log = copy(base.params), tuning.new_log(len(FACTS))
    tuning.check(method, base.params, state, facts, log, config.tuning.batch_size)

    (bucket,) = examples
    whole = backbone.join(base.params)
    logits_FTV = jax.jit(lambda tokens_FT: backbone.logits(helpers.BACKBONE, whole, tokens_FT))(bucket.tokens_FT)
    log_probabilities_FTV = np.asarray(jax.nn.log_softmax(logits_FTV))
    targets_FT, mask_FT = next_tokens(bucket)
    losses_FT = -np.take_along_axis(log_probabilities_FTV, targets_FT[:, :, None], axis=-1)[:, :, 0]
    expected_F = losses_FT.sum(axis=1, where=mask_FT)
    np.testing.assert_allclose(log.total_F[bucket.index_F], expected_F, rtol=1e-4)

    for _ in range(8):
        state = tuning.train_epoch(method, base.params, state, facts, log, config.tuning, 0)
        log.loss.append(0.0)
    assert log.total_F.sum() < 0.8 * expected_F.sum()
    assert helpers.same_bits(base.params, params)


@pytest.mark.parametrize(
    "budget_facts, kinds", [(0, [tuning.HostBucket] * 2), (10, [tuning.Bucket, tuning.HostBucket])]
)
def test_activations_on_the_host_change_nothing(base, budget_facts, kinds):
    """Those that the devices have no room for come from the host, batch by batch, to the same bits."""
    facts = FACTS[:10] + [dataclasses.replace(fact, answer=fact.answer * 8) for fact in FACTS[10:]]
    results = []
    for options in ({}, {"budget": 4.0 * 40 * helpers.BACKBONE.width * budget_facts}):
        ready = helpers.make_tuning(helpers.CONFIG, base, facts, **options)
        state, log = epochs(ready, ready.fresh_state(), 2)
        tuning.check(ready.method, base.params, state, ready.facts, log, helpers.CONFIG.tuning.batch_size)
        results.append((state, log.total_F, log.worst_F))
    assert [type(bucket) for bucket in ready.facts.buckets] == kinds
    assert helpers.same_bits(*results)
