"""A memory of `memory.positions=answer` acts from the position that predicts the answer's first token on.

What it computes is compared with a plain model whose every position is run, with LoRAs that begin to act there.
"""

import helpers
import jax
import numpy as np
import pytest
import reference
from reference import relative_error

from lamini_jax.backbone import decoding, frozen_model
from lamini_jax.backbone.checkpoints import huggingface
from lamini_jax.backbone.frozen_model import Adapters
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact
from lamini_jax.memory import experts

# Questions and answers of different lengths in one bucket.
FACTS = [Fact("", *pair) for pair in (("Who is it?", "K4X2P"), ("Where is box?", ""), ("What of Ada Stone", "7Q"))]
# Plain gradient descent, so that a step shows its gradient.
CONFIG = helpers.with_optimizer(helpers.replace(helpers.CONFIG, tuning={"batch_size": 4}), "sgd", 1.0)
K = CONFIG.memory.top_k
GATES_BK = np.full((len(FACTS), K), K**-0.5, np.float32)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """The model as a checkpoint, for the reference to read."""
    directory = tmp_path_factory.mktemp("positions")
    huggingface.save_backbone(directory, model.decoder.config, frozen_model.transformer.join_layers(model.params))
    return directory


@pytest.fixture(scope="module")
def rows_BKR():
    """Experts of each fact, strong enough to change its answer."""
    rng, shape = np.random.default_rng(0), experts.expert_shape(CONFIG.backbone, CONFIG.memory)
    parts = shape.parts(len(FACTS), K).items()
    return {name: rng.normal(0, 3 * part[-1] ** -0.5, part).astype(np.float32) for name, part in parts}


@pytest.fixture(scope="module")
def adapter(rows_BKR):
    return experts.adapter(rows_BKR, GATES_BK, "down_proj")


@pytest.fixture(scope="module")
def prompts(model):
    (bucket,) = batches.prompts([fact.question for fact in FACTS], model.tokenizer)
    return bucket.tokens_FT, bucket.length_F


def loras(rows_KR, first):
    """The experts of one fact for the reference, acting at the positions from `first` on."""
    down_KMI, up_KMO = rows_KR["down"], rows_KR["up"] * K**-0.5
    return {f"model.layers.{2 + m}.mlp.down_proj": (down_KMI[:, m], up_KMO[:, m], first) for m in range(2)}


def plain_losses(directory, examples, rows_BKR):
    """The losses of the answer's tokens of each fact, as lists."""
    loras_B = [loras(jax.tree.map(lambda x, b=b: x[b], rows_BKR), examples.start_F[b]) for b in range(len(FACTS))]
    logits_BTV = reference.logits(directory, examples.tokens_FT, loras_B)
    logits_BTV -= np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
    spans = zip(logits_BTV, examples.tokens_FT, examples.start_F, examples.length_F, strict=True)
    return [-logits_TV[np.arange(a, b - 1), tokens_T[a + 1 : b]] for logits_TV, tokens_T, a, b in spans]


def test_losses_and_gradient_of_a_step_are_those_of_the_plain_model(model, directory, rows_BKR):
    ids_BK = np.arange(len(FACTS) * K).reshape(len(FACTS), K)
    method = helpers.make_method(CONFIG, model, FACTS, ids_BK)
    (examples,) = method.data.examples
    assert len(set(examples.start_F)) == len(set(examples.answer_length_F)) == len(FACTS)
    state = method.init()
    for name, part in rows_BKR.items():
        state.experts_NR[name] = state.experts_NR[name].at[ids_BK].set(part)
    state, losses = method.step(model, state, method.data.buckets[0], np.array([0, 1, 2, -1], np.int32))
    expected = plain_losses(directory, examples, rows_BKR)
    np.testing.assert_allclose(losses.total_B[:3], [loss_A.sum() for loss_A in expected], rtol=1e-4)
    np.testing.assert_allclose(losses.worst_B[:3], [loss_A.max() for loss_A in expected], rtol=1e-4)

    gradient_BKR = {name: part - np.asarray(state.experts_NR[name])[ids_BK] for name, part in rows_BKR.items()}
    rng, size = np.random.default_rng(1), 1e-6
    for b in range(len(FACTS)):  # how the loss of each fact changes in a direction, by the plain model alone
        direction = {name: np.zeros(part.shape) for name, part in rows_BKR.items()}
        for part in direction.values():
            part[b] = rng.normal(size=part.shape[1:])
        ahead, behind = (
            plain_losses(directory, examples, {name: rows_BKR[name] + sign * direction[name] for name in rows_BKR})
            for sign in (size, -size)
        )
        slope = (ahead[b].mean() - behind[b].mean()) / (2 * size)
        found = sum(np.vdot(gradient_BKR[name], direction[name]) for name in rows_BKR)
        norm = sum(np.square(gradient_BKR[name][b]).sum() for name in rows_BKR) ** 0.5
        assert norm > 0.01 and found == pytest.approx(slope, abs=1e-3 * float(norm))


def test_decoding_is_what_the_plain_model_finds_likeliest(model, directory, rows_BKR, adapter, prompts):
    prompt_BT, length_B = prompts
    answer_BA, _ = decoding.generate(model, prompt_BT, length_B, 12, Adapters(answer=adapter))
    differs = False
    for b, length in enumerate(length_B):
        answer_A = np.asarray(answer_BA)[b, :12]
        tokens_T = np.concatenate([prompt_BT[b, :length], answer_A])
        rows_KR = jax.tree.map(lambda x, b=b: x[b], rows_BKR)
        two = [loras(rows_KR, length - 1), loras(rows_KR, 0)]
        logits_TV, everywhere_TV = reference.logits(directory, np.stack(2 * [tokens_T]), two)
        stops = np.flatnonzero(answer_A == model.tokenizer.stop_id)
        end = stops[0] + 1 if stops.size else 12
        likeliest_A, everywhere_A = (x_TV[length - 1 : -1].argmax(axis=-1)[:end] for x_TV in (logits_TV, everywhere_TV))
        np.testing.assert_array_equal(likeliest_A, answer_A[:end])
        differs |= (everywhere_A != likeliest_A).any()
    assert differs  # from a memory that acts on all tokens


def test_logits_beside_an_answer_are_those_of_the_plain_model(model, directory, rows_BKR, adapter):
    (examples,) = batches.encode(FACTS, model.tokenizer)

    @jax.jit
    def logits(tokens_BT, start_B):
        hidden_BTD = frozen_model.read_prefix(model, tokens_BT)
        return frozen_model.answer_logits(model, hidden_BTD, start_B, 3, Adapters(answer=adapter))

    found_BAV = logits(examples.tokens_FT, examples.start_F)
    for b, start in enumerate(examples.start_F):
        lora = loras(jax.tree.map(lambda x, b=b: x[b], rows_BKR), start)
        (expected_TV,) = reference.logits(directory, examples.tokens_FT[b : b + 1], [lora])
        count = min(3, examples.answer_length_F[b])
        assert relative_error(found_BAV[b, :count], expected_TV[start : start + count]) < 1e-4


def test_the_question_is_read_by_the_bare_backbone(model, adapter, prompts):
    """Its keys and values are that of the backbone bit for bit, up to the position that the answer begins with."""
    bare, adapted = (
        decoding.prefill(model, *prompts, 1, adapters).rooms for adapters in (Adapters(), Adapters(answer=adapter))
    )
    assert helpers.same_bits(bare[0], adapted[0])
    for b, length in enumerate(prompts[1]):
        for name in ("keys", "values"):
            before, after = (np.moveaxis(rooms[1][name][:, b], 2, 1) for rooms in (bare, adapted))
            assert helpers.same_bits(before[:, : length - 1], after[:, : length - 1])
            # The second memory layer reads what the first one has changed.
            assert (before[1, length - 1] != after[1, length - 1]).all()
