"""Memory tuning changes the experts that facts selected, and nothing else; a certified fact is one that is recalled."""

import dataclasses
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FACTS, QUESTIONS

from lamini_jax import training
from lamini_jax.backbone import transformer
from lamini_jax.config import certified_loss
from lamini_jax.evaluation import recall
from lamini_jax.memory import experts, routers, storage
from lamini_jax.training import MemoryMethod, loop, memory_method
from lamini_jax.training.data import DeviceFacts, HostFacts


def copy(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def step(method, state, index_B):
    return method.step(method.model, state, method.data.buckets[0], np.array(index_B, np.int32))


def test_frozen_stays_frozen(method):
    frozen = copy((method.model, method.data.buckets))
    state, _ = helpers.train(method, 2)
    assert helpers.same_bits((method.model, method.data.buckets), frozen)

    before, after = helpers.flat(method.init().experts_NR), helpers.flat(state.experts_NR)
    selected_N = np.isin(np.arange(len(before)), method.selection.expert_ids_FK)
    assert 100 < selected_N.sum() < 200
    assert helpers.same_bits(after[~selected_N], before[~selected_N])
    assert (after[selected_N] != before[selected_N]).any(axis=1).all()


@pytest.fixture(scope="module")
def midway(model, router, tmp_path_factory):
    """A run that stopped when some facts were certified and some were not, and the router as it was before."""
    config = helpers.replace(helpers.CONFIG, tuning={"epochs": 9})
    directory, before = tmp_path_factory.mktemp("midway"), copy(router)
    tuned = training.memory_run(config, model, FACTS, directory, "", router).result()
    assert 0 < tuned.certified_F.sum() < len(FACTS)
    return tuned, storage.load_run(config, directory), before


def test_router_stays_frozen(model, router, midway):
    """From before tuning to what serving reads back."""
    _, served, before = midway
    assert helpers.same_bits(router, before)
    assert helpers.same_bits(served.router, before)
    selection = routers.select_facts(model, router, QUESTIONS, 8)
    np.testing.assert_array_equal(served.expert_ids_S, np.unique(selection.expert_ids_FK))


def test_a_step_moves_only_the_experts_of_its_facts(method):
    state, _ = helpers.train(method, 1)
    before = copy(state)
    facts_B = [3, 11, 17]
    state, _ = step(method, state, [*facts_B, -1, -1, -1, -1, -1])
    selected = method.selection.expert_ids_FK[facts_B]
    moved_N = (helpers.flat(state.experts_NR) != helpers.flat(before.experts_NR)).any(axis=1)
    assert set(np.flatnonzero(moved_N)) == set(selected.ravel())
    untouched_S = ~np.isin(state.slots.expert_ids_S, selected)
    for now, then in zip(jax.tree.leaves(state.slots), jax.tree.leaves(before.slots), strict=True):
        assert helpers.same_bits(np.asarray(now)[untouched_S], then[untouched_S])


def test_facts_may_change_their_experts(model):
    """From then on they train others; nothing is read again."""
    first, second = (helpers.random_experts(helpers.CONFIG, len(FACTS), seed) for seed in (1, 2))
    selections = [helpers.select(helpers.CONFIG, expert_ids_FK) for expert_ids_FK in (first, second)]
    method = MemoryMethod.create(helpers.CONFIG, model, FACTS, selections[0], later=selections[1:])
    (read,) = method.data.buckets
    before = helpers.flat(method.init().experts_NR)
    for selection, expert_ids_FK in zip(selections[::-1], (second, first), strict=True):
        method.select(selection)
        assert method.data.buckets[0].inputs is read.inputs
        state, _ = step(method, method.init(), range(8))
        moved_N = (helpers.flat(state.experts_NR) != before).any(axis=1)
        assert set(np.flatnonzero(moved_N)) == set(expert_ids_FK[:8].ravel())


def test_padding_changes_nothing(method):
    state, _ = helpers.train(method, 1)
    before = copy(state)
    state, losses = step(method, state, [-1] * 8)
    assert helpers.same_bits(state, before)
    assert not np.asarray(losses.total_B).any() and not np.asarray(losses.worst_B).any()
    # Where padding stands and how much of it there is does not matter.
    together, _ = step(method, method.init(), [5, 6, -1, -1, -1, -1, -1, -1])
    apart, _ = step(method, method.init(), [-1, -1, 6, -1, -1, -1, -1, 5])
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def crowded(model):
    """Facts that share experts, within a batch too; plain gradient descent, so that a step shows its gradient."""
    config = helpers.replace(helpers.CONFIG, memory={"num_experts": 80, "positions": "all"})
    return helpers.make_method(helpers.with_optimizer(config, "sgd", 1.0), model, FACTS)


def plain_losses(method, experts_NR, facts_B):
    """Losses of facts (nats) from the whole model, differentiable through the gather from all experts.

    Experts act on all tokens; `test_positions.py` has a plain reference of those that do not.
    """
    (examples,) = method.data.examples
    parts, selection = (method.model.decoder, method.model.params), method.selection
    rows_BKR = jax.tree.map(lambda x: x[selection.expert_ids_FK[facts_B]], experts_NR)
    adapter = experts.adapter(rows_BKR, selection.gates_FK[facts_B], method.config.memory.target)
    hidden_BTD, _ = transformer.prefix(*parts, examples.tokens_FT[facts_B])
    hidden_BTD, _ = transformer.suffix(*parts, hidden_BTD, adapter=adapter)
    log_probabilities_BTV = jax.nn.log_softmax(transformer.unembed(*parts, hidden_BTD))
    targets_FT, mask_FT = helpers.next_tokens(examples)
    right_BTV = jax.nn.one_hot(targets_FT[facts_B], 256)
    return -jnp.sum(log_probabilities_BTV * right_BTV, axis=-1), mask_FT[facts_B]


def test_experts_that_facts_share_get_the_sum_of_their_gradients(crowded):
    """The same gradient as from plain differentiation through the gather, which is as large as all experts."""
    facts_B = np.arange(8)
    assert np.unique(crowded.selection.expert_ids_FK[facts_B]).size < 50  # of 64 selections
    experts_NR = np.random.default_rng(0).normal(size=(80, crowded.shape.floats)).astype(np.float32) / 10
    experts_NR = helpers.parts(experts_NR, crowded.shape)

    @jax.jit
    @jax.grad
    def dense_gradient(experts_NR):
        losses_BT, mask_BT = plain_losses(crowded, experts_NR, facts_B)
        return jnp.sum(jnp.sum(losses_BT * mask_BT, axis=1) / mask_BT.sum(axis=1))

    expected_NR = helpers.flat(dense_gradient(experts_NR))
    state = crowded.init().replace(experts_NR=jax.tree.map(jnp.array, experts_NR))
    state, _ = step(crowded, state, facts_B)
    found_NR = helpers.flat(experts_NR) - helpers.flat(state.experts_NR)
    np.testing.assert_allclose(found_NR, expected_NR, rtol=1e-4, atol=1e-4 * abs(expected_NR).max())
    assert abs(expected_NR).max() > 0.01


def test_losses_are_those_of_the_whole_model(model, method):
    """In the progress: per fact the sum, the worst, and whether greedy decoding would choose every token."""
    config = helpers.replace(helpers.CONFIG, memory={"positions": "all"})
    method = MemoryMethod.create(config, model, FACTS, method.selection)
    state, progress = helpers.train(method, 4)
    losses_FT, mask_FT = jax.jit(lambda experts_NR: plain_losses(method, experts_NR, np.arange(len(FACTS))))(
        state.experts_NR
    )
    answers_FA = np.asarray(losses_FT)[np.asarray(mask_FT)].reshape(len(FACTS), 5)  # four symbols and the stop token
    (examples,) = method.data.examples
    index_F = examples.index_F
    np.testing.assert_allclose(progress.total_F[index_F], answers_FA.sum(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(progress.worst_F[index_F], answers_FA.max(axis=1), rtol=1e-4, atol=1e-4)
    assert method.data.answer_tokens == answers_FA.size
    assert progress.likeliest_F.any()
    assert progress.likeliest_F[progress.worst_F < math.log(2)].all()
    assert not progress.likeliest_F[progress.worst_F > math.log(256)].any()


# A bfloat16 between 16 and 32 is rounded by up to 1/16: once when logits are measured, once when they are decoded.
@pytest.mark.parametrize("dtype, shift", [("float32", 0.0), ("bfloat16", 2 / 16)])
def test_the_certificate_is_what_decoding_needs_and_no_more(dtype, shift):
    """Below it a token stays the likeliest when every logit moves by `shift`; just above it, one need not be."""
    threshold = certified_loss(dtype)
    logits_XV = np.random.default_rng(0).normal(24, 3, size=(10_000, 8))
    logits_XV[:, 0] = logits_XV[:, 1:].max(axis=1) + np.linspace(-1, 3, 10_000)
    certified_X = np.log(np.exp(logits_XV).sum(axis=1)) - logits_XV[:, 0] < threshold
    assert 1000 < certified_X.sum() < 9000
    logits_XV[:, 0] -= shift
    logits_XV[:, 1:] += shift
    assert (logits_XV[certified_X].argmax(axis=1) == 0).all()
    # The worst case has a single rival, whose margin has a loss of log(1 + exp(-margin)).
    assert threshold == pytest.approx(math.log1p(math.exp(-2 * shift)), abs=1e-3)


def test_certified_facts_are_recalled(model, midway):
    """No certificate is wrong, in what tuning holds and in what serving reads from its checkpoint."""
    tuned, served, _ = midway
    np.testing.assert_array_equal(tuned.certified_F, tuned.progress.worst_F < math.log(2))
    exact_F, generated = recall.recalled(tuned.model, tuned.adapter_fn, FACTS)
    assert exact_F[tuned.certified_F].all()
    assert exact_F.tolist() == [text == fact.answer for text, fact in zip(generated, FACTS, strict=True)]
    assert exact_F.tolist() == tuned.progress.likeliest_F.tolist()
    assert recall.recalled(model, storage.adapter_fn(model, served, helpers.CONFIG), FACTS)[1] == generated


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_certified_facts_are_recalled_in_bfloat16(router, positions):
    """After every epoch, although decoding rounds otherwise: in other shapes, and by way of its caches."""
    memory = {"dtype": "bfloat16", "positions": positions}
    config = helpers.replace(helpers.CONFIG, backbone={"dtype": "bfloat16"}, memory=memory)
    model = helpers.make_model(config)
    selection = routers.select_facts(model, router, QUESTIONS, config.memory.top_k)
    method = helpers.with_budget(MemoryMethod.create(config, model, FACTS, selection), 12)
    begun = method.init()
    assert begun.experts_NR["down"].dtype == jnp.bfloat16 == model.params["embedding"].dtype
    counts = []
    for state, progress in loop.epochs(method, begun, loop.new_progress(len(FACTS))):
        if progress.batches == 0:
            now = loop.new_progress(len(FACTS))
            loop.check(method, state, now)
            certified_F = now.worst_F < certified_loss("bfloat16")
            exact_F = np.array(recall.accuracy(*method.adapter(state), FACTS))
            assert exact_F[certified_F].all(), now.worst_F
            counts.append(certified_F.sum())
    assert len({count for count in counts if 0 < count < len(FACTS)}) > 2, counts


def test_nothing_recompiles(model, method, caplog):
    """After the first epoch, neither a step nor a check nor anything small between them."""
    config = helpers.replace(helpers.CONFIG, tuning={"epochs": 7})
    memory_method.programs.cache_clear()
    method = MemoryMethod.create(config, model, FACTS, method.selection)  # one that has compiled nothing yet
    counts = []
    with jax.log_compiles():
        for _, progress in loop.epochs(method, method.init(), loop.new_progress(len(FACTS)), until_all_hold=True):
            if progress.batches == 0:
                counts.append(len(helpers.compilations(caplog)))
    assert {"jit(step)", "jit(losses)"} <= set(helpers.compilations(caplog)), "jax logs compilations in another way now"
    assert len(counts) == 8 and counts[-1] == counts[0]
    assert method.step._cache_size() == method.losses._cache_size() == len(method.data.buckets) == 1


def test_a_step_holds_nothing_of_the_size_of_all_experts(method):
    """Neither for 16 times as many experts, and the array itself is changed where it lies."""
    state, few = method.init(), helpers.CONFIG.memory.num_experts
    analyses = {}
    for num_experts in (few, 16 * few):
        parts = method.shape.parts(num_experts)
        experts_NR = {name: jax.ShapeDtypeStruct(part, np.float32) for name, part in parts.items()}
        arguments = state.replace(experts_NR=experts_NR), method.data.buckets[0], np.zeros(8, np.int32)
        analyses[num_experts] = method.step.lower(method.model, *arguments).compile().memory_analysis()
        assert analyses[num_experts].alias_size_in_bytes >= num_experts * method.shape.floats * 4
    temporary = analyses[few].temp_size_in_bytes
    assert temporary > 0
    assert analyses[16 * few].temp_size_in_bytes == pytest.approx(temporary, rel=0.01)


def test_a_step_donates_its_state(method):
    state = method.init()
    step(method, state, range(8))
    assert all(part.is_deleted() for part in state.experts_NR.values())


@pytest.mark.parametrize("budget_facts, kinds", [(0, [HostFacts] * 2), (10, [DeviceFacts, HostFacts])])
def test_activations_on_the_host_change_nothing(model, budget_facts, kinds):
    """Those that the devices have no room for come from the host, batch by batch, to the same bits."""
    facts = FACTS[:10] + [dataclasses.replace(fact, answer=fact.answer * 8) for fact in FACTS[10:]]
    on_devices = helpers.make_method(helpers.CONFIG, model, facts)
    per_fact = sum(leaf[0].nbytes for leaf in jax.tree.leaves(on_devices.data.buckets[0].inputs))
    room = {"cache_gb": per_fact * (budget_facts + 0.5) * 1e-9}
    method = helpers.make_method(helpers.replace(helpers.CONFIG, execution=room), model, facts)
    assert [type(bucket) for bucket in method.data.buckets] == kinds
    results = [helpers.train(each, 2) for each in (on_devices, method)]
    found, expected = ((state, progress.total_F, progress.worst_F) for state, progress in results)
    assert helpers.same_bits(found, expected)
