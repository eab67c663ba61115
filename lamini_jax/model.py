"""Lamini-1: the frozen backbone, the router and the bank put together.

question ──prefix (frozen)──┬─────────────── hidden_BTD ──────────────► suffix (frozen + adapter) ──► logits_BTV
                            └► pool ► query_BC ► lookup(keys)    ► expert_ids_BK, gates_BK
                                                      └► gather rows_BKR from the bank ──────────┘
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax import backbone, hf, processes, router, sharding
from lamini_jax.backbone import Decoder
from lamini_jax.config import Config, from_config_dict
from lamini_jax.data import batches, world
from lamini_jax.data import tokenizer as tokenizers
from lamini_jax.data.tokenizer import ByteTokenizer, CheckpointTokenizer
from lamini_jax.errors import UserError

_ROUTING_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Base:
    """What stays frozen and is the same for every run: the backbone, cut where the memory begins, and its tokenizer."""

    decoder: Decoder
    params: backbone.Params
    tokenizer: ByteTokenizer | CheckpointTokenizer
    fingerprint: str = ""  # of the weights


def configure(values) -> Config:
    """The config in a ConfigDict, with what the checkpoint at its `backbone.path` decides.

    Raises UserError for what makes no sense, or for a checkpoint that is not the one described.
    """
    return from_config_dict(values, hf.resolve)


def load_tokenizer(config: Config) -> ByteTokenizer | CheckpointTokenizer:
    """The tokenizer of the backbone that `config` names."""
    if not config.backbone.path:
        return ByteTokenizer()
    return tokenizers.load(hf.locate(config.backbone.path), config.backbone.vocab_size)


def load_base(config: Config) -> Base:
    """The backbone that `config` names. Raises UserError if the weights at hand have another shape."""
    decoder = Decoder(config.backbone, config.memory.layers, config.tuning.rematerialize)
    if config.backbone.path:
        path = hf.locate(config.backbone.path)
        params = hf.load_cut(decoder)
    else:
        path = backbone.SHIPPED
        shipped, whole = backbone.shipped()
        for field in dataclasses.fields(shipped):
            asked, found = getattr(config.backbone, field.name), getattr(shipped, field.name)
            if asked != found and field.name != "dtype":
                raise UserError(f"--config.backbone.{field.name}={asked}: the backbone that ships has {found}")
        params = backbone.put(decoder, backbone.cut(whole, config.memory.layers))
    return Base(decoder, params, load_tokenizer(config), hf.fingerprint(path))


@functools.partial(jax.jit, static_argnames="decoder")
def read(decoder: Decoder, params, tokens_BT):
    """hidden_BTD: what the frozen prefix makes of some tokens. Computed once per fact and kept."""
    return backbone.prefix(decoder, params, tokens_BT)[0]


@functools.partial(jax.jit, static_argnames="decoder")
def features(decoder: Decoder, params, prompt_BT, length_B):
    """feature_BD of questions; a prompt holds no answer, so a selection cannot depend on one."""
    return sharding.constrain(router.pool(backbone.prefix(decoder, params, prompt_BT)[0], length_B))


@functools.partial(jax.jit, static_argnames=("decoder", "num_selected"))
def select(decoder: Decoder, params, routing: router.Router, prompt_BT, length_B, num_selected: int):
    """The experts of questions (step 1 of section 7.1)."""
    return router.select(routing, features(decoder, params, prompt_BT, length_B), num_selected)


def token_losses(decoder: Decoder, params, hidden_BTD, start_B, targets_BA, suffix_adapter):
    """loss_BA in nats of an answer's tokens given the prefix's output, and whether greedy decoding would choose each.

    `start_B` is the position that predicts the first of them. Logits are computed for them alone: with a large
    vocabulary those of all positions would cost more than the suffix does.
    """
    logits_BAV = answer_logits(decoder, params, hidden_BTD, start_B, targets_BA.shape[1], suffix_adapter)
    with jax.named_scope("logits"):
        right_BA = jnp.take_along_axis(logits_BAV, targets_BA[:, :, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits_BAV, axis=-1) - right_BA, right_BA >= logits_BAV.max(axis=-1)


def answer_logits(decoder: Decoder, params, hidden_BTD, start_B, length: int, suffix_adapter):
    """logits_BAV at the `length` positions from `start_B` on, given the prefix's output."""
    with jax.named_scope("suffix"):
        hidden_BTD, _ = backbone.suffix(decoder, params, hidden_BTD, adapter=suffix_adapter)
    with jax.named_scope("logits"):
        places_BA1 = (start_B[:, None] + jnp.arange(length)[None])[:, :, None]
        hidden_BAD = jnp.take_along_axis(hidden_BTD, jnp.minimum(places_BA1, hidden_BTD.shape[1] - 1), axis=1)
        return sharding.constrain(backbone.unembed(decoder, params, hidden_BAD), "batch", None, "vocab")


def make_router(config: Config, base: Base, questions: list[str]) -> router.Router:
    """The router for some facts: whitened and trained on their questions and on questions of the generated world."""
    return router.train(config, calibration_features(config, base, questions))


def calibration_features(config: Config, base: Base, questions: list[str]) -> np.ndarray:
    """features_QD of what a router is trained on: these questions, then those of the generated world."""
    stream = world.training_stream(config.seed)
    calibration = [next(stream).question for _ in range(config.router.calibration)]
    prompts = batches.prompts(questions + calibration, base.tokenizer)
    return over(prompts, lambda tokens, lengths: features(base.decoder, base.params, tokens, lengths))


def select_all(base: Base, routing: router.Router, questions: list[str], num_selected: int) -> np.ndarray:
    """expert_ids_FK of many questions. Raises UserError if one of them has none, for NaN."""
    prompts = batches.prompts(questions, base.tokenizer)
    expert_ids_FK = over(
        prompts,
        lambda tokens, lengths: select(base.decoder, base.params, routing, tokens, lengths, num_selected).expert_ids_BK,
    )
    refused = np.flatnonzero(expert_ids_FK[:, 0] == routing.num_experts)
    if refused.size:
        raise UserError(f"the backbone or the router makes NaN of the question {questions[refused[0]]!r}")
    return expert_ids_FK


def queries(base: Base, routing: router.Router, questions: list[str]) -> np.ndarray:
    """query_FC of many questions: what a lookup compares with its keys."""
    prompts = batches.prompts(questions, base.tokenizer)
    return over(prompts, lambda tokens, lengths: _query(base.decoder, base.params, routing, tokens, lengths))


@functools.partial(jax.jit, static_argnames="decoder")
def _query(decoder: Decoder, params, routing: router.Router, prompt_BT, length_B):
    feature_BD = features(decoder, params, prompt_BT, length_B)
    return router.query(routing.mean_D, routing.transform_DC, feature_BD, routing.lookup)


def over(prompts: list[batches.Prompts], function):
    """`function(prompt_BT, length_B)` over buckets in batches of one size; results in the order of the questions.

    They are a pytree of arrays with a leading axis B, which are put together. Tells of its progress if it takes long.
    """
    parts, order = [], []
    count = sum(len(bucket.index_F) for bucket in prompts)
    with processes.bar(total=count, desc="reading", unit="question", delay=processes.LONG, leave=False) as bar:
        for bucket in prompts:
            for rows_B in batches.in_order(len(bucket.index_F), min(_ROUTING_BATCH, len(bucket.index_F))):
                valid = rows_B >= 0
                part = function(bucket.tokens_FT[rows_B], bucket.length_F[rows_B])
                parts.append(jax.tree.map(lambda x, valid=valid: np.asarray(x)[valid], part))
                order.append(bucket.index_F[rows_B[valid]])
                bar.update(int(valid.sum()))
    order = np.argsort(np.concatenate(order))
    return jax.tree.map(lambda *x: np.concatenate(x)[order], *parts)
