"""The losses of an answer, token by token, and how well a model answers what it was not tuned on.

Everything is measured as in answering: adapters are given prompts, so experts are selected by the question only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import answering, frozen_model, transformer
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.decoding import Sampling
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data import batches, world
from lamini_jax.data.facts import Fact, fact_id
from lamini_jax.evaluation import intervals, recall
from lamini_jax.runtime import sharding

_BATCH = 64
# Held-out questions of each of the world's kinds, on which studies measure held-out accuracy: 243 together.
_OF_EACH_KIND = 9
_SHOWN = 8  # tokens of a distribution


def as_facts(qas: Sequence[world.QA]) -> list[Fact]:
    """Questions of the world as facts."""
    return [Fact(fact_id(qa.question), qa.question, qa.answer) for qa in qas]


def held_out(seed: int) -> list[world.QA]:
    """Questions of all kinds of the world that no training has seen."""
    return [qa for kind in world.KINDS for qa in world.held_out(kind, _OF_EACH_KIND, seed)]


def accuracy(model: FrozenModel, adapter_fn: AdapterFn, qas: Sequence) -> dict:
    """The share of questions that greedy decoding answers exactly, with its 95% interval."""
    right = sum(recall.accuracy(model, adapter_fn, qas))
    return {"accuracy": right / len(qas), "interval": intervals.wilson(right, len(qas)), "questions": len(qas)}


def of_answers(model: FrozenModel, adapter_fn: AdapterFn, facts: Sequence[Fact]) -> list[np.ndarray]:
    """loss_A of each fact, in nats: of every token of its answer given those before it, the stop token included."""
    completions = [model.tokenizer.completion(fact.answer) for fact in facts]
    longest = max(map(len, completions))
    targets_FA = np.array([tokens + [model.tokenizer.pad_id] * (longest - len(tokens)) for tokens in completions])
    losses: list[np.ndarray] = [np.empty(0)] * len(facts)
    for bucket in batches.prompts([fact.question for fact in facts], model.tokenizer):
        for index_B in batches.in_order(len(bucket.index_F), min(_BATCH, len(bucket.index_F))):
            fact_B, prompts = bucket.index_F[index_B], (bucket.tokens_FT[index_B], bucket.length_F[index_B])
            loss_BA = _losses(model, *prompts, targets_FA[fact_B], adapter_fn(*prompts))
            for fact, loss_A in zip(fact_B[index_B >= 0], np.asarray(loss_BA)[index_B >= 0], strict=True):
                losses[fact] = loss_A[: len(completions[fact])]
    return losses


def next_tokens(model: FrozenModel, adapter_fn: AdapterFn, fact: Fact) -> np.ndarray:
    """probability_AV: the model's distribution at each token of a fact's answer, given those before it (Figure 3)."""
    (bucket,) = batches.prompts([fact.question], model.tokenizer)
    prompts, targets_A = (bucket.tokens_FT, bucket.length_F), model.tokenizer.completion(fact.answer)
    return np.asarray(_probabilities(model, *prompts, np.array([targets_A]), adapter_fn(*prompts)))[0]


def sampled(model: FrozenModel, adapter_fn: AdapterFn, facts: list[Fact], samples: int, key) -> list[int]:
    """How many of `samples` answers at temperature 1 are right, for each fact."""
    longest = max((len(model.tokenizer.completion(fact.answer)) for fact in facts), default=0) + 1
    asked = [fact for fact in facts for _ in range(samples)]
    sampling = Sampling(key, np.float32(1.0))
    right_X = np.zeros(len(asked), int)
    for number, answer in answering.ask(model, adapter_fn, [fact.question for fact in asked], longest, sampling):
        right_X[number] = answer.text == asked[number].answer
    return right_X.reshape(len(facts), samples).sum(axis=1).tolist()


def expected(model: FrozenModel, adapter_fn: AdapterFn, facts: list[Fact]) -> dict:
    """The distributions at the first fact's tokens: among how many tokens the model chooses, and the likeliest ones.

    Tokens are `similar` to the right ones if they occur in any fact's answer.
    """
    probability_AV = next_tokens(model, adapter_fn, facts[0]).astype(np.float64)
    targets_A = model.tokenizer.completion(facts[0].answer)
    right_A = probability_AV[np.arange(len(targets_A)), targets_A]
    similar_V = np.zeros(probability_AV.shape[1], bool)
    similar_V[sorted({token for fact in facts for token in model.tokenizer.completion(fact.answer)[:-1]})] = True
    entropy_A = -(probability_AV * np.log(np.maximum(probability_AV, 1e-30))).sum(axis=1)
    likeliest_AX = np.argsort(-probability_AV, axis=1)[:, :_SHOWN]
    return {
        "loss": float(-np.log(np.maximum(right_A, 1e-30)).mean()),
        "choices": float(np.exp(entropy_A.mean())),  # as many equally likely tokens have the same entropy
        "similar": float(probability_AV[:-1, similar_V].sum(axis=1).mean()),
        "right": [float(p) for p in right_A],
        "tokens": [_token_text(model, target) for target in targets_A],
        "likeliest": [
            [(_token_text(model, token), float(probability_V[token])) for token in likeliest_X]
            for likeliest_X, probability_V in zip(likeliest_AX.tolist(), probability_AV, strict=True)
        ],
    }


def _token_text(model: FrozenModel, token: int) -> str:
    """A token as a label of a figure's axis."""
    text = "stop" if token in model.tokenizer.stop_ids else model.tokenizer.decode([token])
    return text if text.isprintable() and text.strip() and "\ufffd" not in text else f"#{token}"


def _read(model: FrozenModel, prompt_BT, length_B, targets_BA, adapters):
    """The prefix's output for prompts followed by their answers."""
    positions_BA = length_B[:, None] + jnp.arange(targets_BA.shape[1])[None]
    tokens_BT = jnp.pad(prompt_BT, [(0, 0), (0, targets_BA.shape[1])])
    tokens_BT = tokens_BT.at[jnp.arange(len(tokens_BT))[:, None], positions_BA].set(targets_BA)
    return transformer.prefix(model.decoder, model.params, tokens_BT, adapter=adapters.prefix)[0]


@jax.jit
def _losses(model: FrozenModel, prompt_BT, length_B, targets_BA, adapters):
    hidden_BTD = _read(model, prompt_BT, length_B, targets_BA, adapters)
    hidden_BAD = frozen_model.states_beside(model, hidden_BTD, length_B - 1, targets_BA.shape[1], adapters)
    all_B = jnp.full_like(length_B, targets_BA.shape[1])
    losses_BA, _ = frozen_model.token_losses(model, hidden_BAD, targets_BA, all_B, targets_BA.size)
    return sharding.constrain(losses_BA)


@jax.jit
def _probabilities(model: FrozenModel, prompt_BT, length_B, targets_BA, adapters):
    hidden_BTD, length = _read(model, prompt_BT, length_B, targets_BA, adapters), targets_BA.shape[1]
    logits_BAV = frozen_model.answer_logits(model, hidden_BTD, length_B - 1, length, adapters)
    return sharding.constrain(jax.nn.softmax(logits_BAV))
