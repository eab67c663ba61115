"""What an answer costs the model, token by token, and how far it knows what nothing was tuned on.

Everything is measured as it is served: `adapt` is given prompts, and experts are selected by the question alone.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax import backbone, model, recall, sharding
from lamini_jax.data import batches, world
from lamini_jax.data.facts import Fact, fact_id
from lamini_jax.decoding import Sampling

_BATCH = 64
# Held-out questions of each of the world's kinds, of which studies take their held-out accuracy: 243 together.
_OF_EACH_KIND = 9
_SHOWN = 8  # tokens of a distribution


def as_facts(qas: Sequence[world.QA]) -> list[Fact]:
    """Questions of the world as facts."""
    return [Fact(fact_id(qa.question), qa.question, qa.answer) for qa in qas]


def held_out(seed: int) -> list[world.QA]:
    """Questions of all kinds of the world that no training has seen."""
    return [qa for kind in world.KINDS for qa in world.held_out(kind, _OF_EACH_KIND, seed)]


def accuracy(base: model.Base, adapt: recall.Adapt, qas: Sequence[world.QA]) -> dict:
    """The share of questions that greedy decoding answers exactly, with its 95% interval."""
    right = sum(recall.accuracy(base, adapt, qas))
    return {"accuracy": right / len(qas), "interval": recall.wilson(right, len(qas)), "questions": len(qas)}


def of_answers(base: model.Base, adapt: recall.Adapt, facts: Sequence[Fact]) -> list[np.ndarray]:
    """loss_A of each fact, in nats: of every token of its answer given those before it, the stop token included."""
    completions = [base.tokenizer.completion(fact.answer) for fact in facts]
    longest = max(map(len, completions))
    targets_FA = np.array([tokens + [base.tokenizer.pad_id] * (longest - len(tokens)) for tokens in completions])
    losses: list[np.ndarray] = [np.empty(0)] * len(facts)
    for bucket in batches.prompts([fact.question for fact in facts], base.tokenizer):
        for rows_B in batches.in_order(len(bucket.index_F), min(_BATCH, len(bucket.index_F))):
            index_B, prompts = bucket.index_F[rows_B], (bucket.tokens_FT[rows_B], bucket.length_F[rows_B])
            loss_BA = _losses(base.decoder, base.params, *prompts, targets_FA[index_B], adapt(*prompts))
            for index, loss_A in zip(index_B[rows_B >= 0], np.asarray(loss_BA)[rows_B >= 0], strict=True):
                losses[index] = loss_A[: len(completions[index])]
    return losses


def next_tokens(base: model.Base, adapt: recall.Adapt, fact: Fact) -> np.ndarray:
    """probability_AV: what the model expects at each token of a fact's answer, given those before it (Figure 3)."""
    (bucket,) = batches.prompts([fact.question], base.tokenizer)
    prompts, targets_A = (bucket.tokens_FT, bucket.length_F), base.tokenizer.completion(fact.answer)
    probability_BAV = _probabilities(base.decoder, base.params, *prompts, np.array([targets_A]), adapt(*prompts))
    return np.asarray(probability_BAV)[0]


def sampled(base: model.Base, adapt: recall.Adapt, facts: list[Fact], samples: int, key) -> list[int]:
    """How many of `samples` answers at temperature 1 are right, for each fact."""
    longest = max((len(base.tokenizer.completion(fact.answer)) for fact in facts), default=0) + 1
    asked = [fact for fact in facts for _ in range(samples)]
    given = recall.ask(base, adapt, [fact.question for fact in asked], longest, Sampling(key, np.float32(1.0)))
    right_X = np.zeros(len(asked), int)
    for number, answer in given:
        right_X[number] = answer.text == asked[number].answer
    return right_X.reshape(len(facts), samples).sum(axis=1).tolist()


def expected(base: model.Base, adapt: recall.Adapt, facts: list[Fact]) -> dict:
    """What the model expects at the first fact's tokens: how many it wavers between, and the likeliest at each place.

    Tokens are `similar` to the right ones if they occur in any fact's answer.
    """
    probability_AV = next_tokens(base, adapt, facts[0]).astype(np.float64)
    targets_A = base.tokenizer.completion(facts[0].answer)
    right_A = probability_AV[np.arange(len(targets_A)), targets_A]
    similar_V = np.zeros(probability_AV.shape[1], bool)
    similar_V[sorted({token for fact in facts for token in base.tokenizer.completion(fact.answer)[:-1]})] = True
    entropy_A = -(probability_AV * np.log(np.maximum(probability_AV, 1e-30))).sum(axis=1)
    likeliest_AX = np.argsort(-probability_AV, axis=1)[:, :_SHOWN]
    return {
        "loss": float(-np.log(np.maximum(right_A, 1e-30)).mean()),
        "choices": float(np.exp(entropy_A.mean())),  # as many equally likely tokens have the same entropy
        "similar": float(probability_AV[:-1, similar_V].sum(axis=1).mean()),
        "right": [float(p) for p in right_A],
        "tokens": [_shown(base, target) for target in targets_A],
        "likeliest": [
            [[_shown(base, token), float(probability_V[token])] for token in likeliest_X]
            for probability_V, likeliest_X in zip(probability_AV, likeliest_AX, strict=True)
        ],
    }


def _shown(base: model.Base, token: int) -> str:
    """A token for a picture's axis."""
    text = "stop" if token in base.tokenizer.stop_ids else base.tokenizer.decode([token])
    return text if text.isprintable() and text.strip() and "\ufffd" not in text else f"#{token}"


def _read(decoder, params, prompt_BT, length_B, targets_BA, adapted):
    """The prefix's output for prompts with their answers behind them."""
    places_BA = length_B[:, None] + jnp.arange(targets_BA.shape[1])[None]
    tokens_BT = jnp.pad(prompt_BT, [(0, 0), (0, targets_BA.shape[1])])
    tokens_BT = tokens_BT.at[jnp.arange(len(tokens_BT))[:, None], places_BA].set(targets_BA)
    return backbone.prefix(decoder, params, tokens_BT, adapter=adapted.prefix)[0]


@functools.partial(jax.jit, static_argnames="decoder")
def _losses(decoder, params, prompt_BT, length_B, targets_BA, adapted):
    hidden_BTD = _read(decoder, params, prompt_BT, length_B, targets_BA, adapted)
    losses_BA, _ = model.token_losses(decoder, params, hidden_BTD, length_B - 1, targets_BA, adapted.suffix)
    return sharding.constrain(losses_BA)


@functools.partial(jax.jit, static_argnames="decoder")
def _probabilities(decoder, params, prompt_BT, length_B, targets_BA, adapted):
    hidden_BTD = _read(decoder, params, prompt_BT, length_B, targets_BA, adapted)
    hidden_BTD, _ = backbone.suffix(decoder, params, hidden_BTD, adapter=adapted.suffix)
    places_BA1 = (length_B[:, None] - 1 + jnp.arange(targets_BA.shape[1])[None])[:, :, None]
    hidden_BAD = jnp.take_along_axis(hidden_BTD, places_BA1, axis=1)
    return sharding.constrain(jax.nn.softmax(backbone.unembed(decoder, params, hidden_BAD)))
