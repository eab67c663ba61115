"""The frozen language model as the rest of the package sees it: weights, tokenizer, and what it computes of a text."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import checkpoints, transformer
from lamini_jax.backbone.linear_layers import Adapter
from lamini_jax.backbone.tokenizer import Tokenizer
from lamini_jax.backbone.transformer import Cache, Context, Known
from lamini_jax.config import Config
from lamini_jax.data import batches
from lamini_jax.runtime import processes, sharding


class Adapters(NamedTuple):
    """What is added to the backbone for some prompts, and the selection that it was made of, if it was."""

    prefix: Adapter | None = None
    suffix: Adapter | None = None
    # Of the suffix too, but only from the position on that predicts the answer's first token.
    answer: Adapter | None = None
    selection: Any = None  # a pytree of arrays with a leading axis B


class Beginning(NamedTuple):
    """The tokens that all prompts begin with, read once without any memory: contexts of both parts, and the prefix's
    output."""

    prefix: Context
    suffix: Context
    hidden_1TD: jax.Array


class QuestionAndAnswer(NamedTuple):
    """What the suffix needs of facts if the memory acts on answers alone.

    The prefix's output at the answer's positions, and the bare suffix's keys and values of the question before them.
    """

    hidden_BAD: jax.Array
    keys_BMPGW: jax.Array
    values_BMPGW: jax.Array


@flax.struct.dataclass
class FrozenModel:
    """What no training changes: the backbone, split where the memory begins, and its tokenizer.

    It is a pytree of the parameters, so that it can be an argument of a `jax.jit` function.
    """

    params: transformer.Params
    decoder: transformer.Decoder = flax.struct.field(pytree_node=False)
    tokenizer: Tokenizer = flax.struct.field(pytree_node=False)
    fingerprint: str = flax.struct.field(pytree_node=False, default="")  # of the weights
    reading_batch: int = flax.struct.field(pytree_node=False, default=64)  # questions read or answered at once
    beginning: Beginning | None = None

    @property
    def max_seq_len(self) -> int:
        return self.decoder.config.max_seq_len

    @property
    def num_shared(self) -> int:
        """The number of tokens that all prompts begin with, and that have been read."""
        return 0 if self.beginning is None else self.beginning.hidden_1TD.shape[1]


def load(config: Config) -> FrozenModel:
    """The backbone that `config` names. Raises UserError if its weights have another shape."""
    decoder = transformer.Decoder(config.backbone, config.memory.num_layers, config.execution.remat)
    source = checkpoints.format_of(config.backbone.path)
    parts = source.load_split(decoder), decoder, source.load_tokenizer(config.backbone)
    model = FrozenModel(*parts, source.fingerprint(config.backbone.path), config.execution.reading_batch)
    return with_beginning(model)


def with_beginning(model: FrozenModel) -> FrozenModel:
    """The model, with what all its prompts begin with read."""
    tokens = model.tokenizer.frame.beginning
    return model.replace(beginning=_read_beginning(model, np.array([tokens], np.int32)) if tokens else None)


@jax.jit
def _read_beginning(model: FrozenModel, tokens_1T) -> Beginning:
    parts, (prefix, suffix) = (model.decoder, model.params), caches(model, *tokens_1T.shape)
    hidden_1TD, prefix = transformer.prefix(*parts, tokens_1T, known=Known(prefix))
    return Beginning(prefix, transformer.suffix(*parts, hidden_1TD, known=Known(suffix))[1], hidden_1TD)


def caches(model: FrozenModel, batch: int, length: int) -> tuple[Cache, Cache]:
    """Room for `length` tokens of `batch` sequences in prefix and suffix, with the shared beginning in it."""
    layers = model.decoder.config.num_layers - model.decoder.memory_layers, model.decoder.memory_layers
    rooms = tuple(transformer.empty_cache(model.decoder.config, n, batch, length) for n in layers)
    if model.beginning is None:
        return rooms
    known = model.beginning.prefix, model.beginning.suffix
    return jax.tree.map(lambda room, context: room.at[:, :, : context.shape[2]].set(context), rooms, known)


def after_beginning(model: FrozenModel, tokens_BT) -> dict[str, Any]:
    """The tokens that follow the shared beginning, and their positions, as arguments of the decoder's parts."""
    tokens_BT = tokens_BT[:, model.num_shared :]
    positions_BT = jnp.broadcast_to(model.num_shared + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return {"tokens_BT": tokens_BT, "positions_BT": positions_BT}


@jax.jit
def read_prefix(model: FrozenModel, tokens_BT):
    """hidden_BTD: the output of the frozen prefix for some prompts, which is computed once per fact and kept."""
    own = after_beginning(model, tokens_BT)
    context = model.beginning and model.beginning.prefix
    hidden_BTD, _ = transformer.prefix(model.decoder, model.params, **own, known=Known(context=context))
    return with_shared(model, hidden_BTD)


def with_shared(model: FrozenModel, hidden_BTD):
    """The prefix's output of whole prompts, from that of the tokens after the shared beginning."""
    if model.beginning is None:
        return hidden_BTD
    shared_1TD = model.beginning.hidden_1TD
    shared_BTD = jnp.broadcast_to(shared_1TD, (hidden_BTD.shape[0], *shared_1TD.shape[1:]))
    return jnp.concatenate([shared_BTD, hidden_BTD], axis=1)


def positions_from(start_B, length: int, tokens: int):
    """The `length` positions from `start_B` on, or the last one again where the sequence of `tokens` ends earlier."""
    return jnp.minimum(start_B[:, None] + jnp.arange(length)[None], tokens - 1)


def question_and_answer(model: FrozenModel, hidden_BTD, start_B, answer: int, question: int) -> QuestionAndAnswer:
    """What the suffix needs for memory on answers of at most `answer` tokens, from the prefix's output.

    `question` is the most positions that a question has before `start_B`, which predicts the answer's first token.
    """
    decoder = model.decoder
    cache = transformer.empty_cache(decoder.config, decoder.memory_layers, *hidden_BTD.shape[:2])
    _, cache = transformer.suffix(decoder, model.params, hidden_BTD, known=Known(cache))
    kept = (jnp.moveaxis(cache[name][:, :, :question], 0, 1) for name in ("keys", "values"))
    at_BA = positions_from(start_B, answer, hidden_BTD.shape[1])
    return QuestionAndAnswer(transformer.pick(hidden_BTD, at_BA), *kept)


@functools.partial(jax.jit, static_argnums=(3, 4))
def read_fact(model: FrozenModel, tokens_BT, start_B, answer: int, question: int) -> QuestionAndAnswer:
    """`question_and_answer` of facts, from their tokens."""
    return question_and_answer(model, read_prefix(model, tokens_BT), start_B, answer, question)


def answer_states(model: FrozenModel, inputs, start_B, length: int, adapter: Adapter | None):
    """hidden_BAD that `unembed` takes, at the `length` positions from `start_B` on.

    `inputs` is the prefix's output, whose suffix has the adapter at all positions, or a QuestionAndAnswer, whose suffix
    has it at these.
    """
    parts = model.decoder, model.params
    with jax.named_scope("suffix"):
        if not isinstance(inputs, QuestionAndAnswer):
            at_BA = positions_from(start_B, length, inputs.shape[1])
            return transformer.suffix(*parts, inputs, adapter=adapter, at_BA=at_BA)[0]
        positions_BA = start_B[:, None] + jnp.arange(length)[None]
        context = {"keys": inputs.keys_BMPGW, "values": inputs.values_BMPGW}
        context = jax.tree.map(lambda x_BMPGW: jnp.moveaxis(x_BMPGW, 1, 0), context)
        return transformer.suffix(*parts, inputs.hidden_BAD, positions_BA, adapter, Known(context=context))[0]


def token_losses(model: FrozenModel, hidden_BAD, targets_BA, length_B, most: int):
    """loss_BA in nats of answers' tokens given the suffix's output, and whether greedy decoding would choose each.

    Those after the first `length_B` of a fact are 0 and True. Logits are computed for the others alone, on each shard
    for at most `most` of them together: with a large vocabulary they cost more than the suffix does.
    """
    B, A, D = hidden_BAD.shape
    shards = sharding.num_shards("batch") if B % sharding.num_shards("batch") == 0 else 1
    most = min(most, B // shards * A)
    with jax.named_scope("logits"):
        valid_ZX = (jnp.arange(A)[None] < length_B[:, None]).reshape(shards, -1)
        index_ZX = jnp.argsort(~valid_ZX, axis=1, stable=True)[:, :most]  # tokens first, padding after them
        hidden_ZXD = jnp.take_along_axis(hidden_BAD.reshape(shards, -1, D), index_ZX[:, :, None], axis=1)
        hidden_ZXD = sharding.constrain(hidden_ZXD, "batch", None, None)
        logits_ZXV = transformer.unembed(model.decoder, model.params, hidden_ZXD)
        logits_ZXV = sharding.constrain(logits_ZXV, "batch", None, "vocab")
        targets_ZX1 = jnp.take_along_axis(targets_BA.reshape(shards, -1), index_ZX, axis=1)[:, :, None]
        right_ZX = jnp.take_along_axis(logits_ZXV, targets_ZX1, axis=-1)[:, :, 0]
        loss_ZX = jax.nn.logsumexp(logits_ZXV, axis=-1) - right_ZX
        place_ZX = jnp.minimum(jnp.cumsum(valid_ZX, axis=1) - 1, most - 1)  # the inverse of index_ZX

        def unpacked(x_ZX, padding):
            return jnp.where(valid_ZX, jnp.take_along_axis(x_ZX, place_ZX, axis=1), padding).reshape(B, A)

        return unpacked(loss_ZX, 0.0), unpacked(right_ZX >= logits_ZXV.max(axis=-1), True)


def states_beside(model: FrozenModel, hidden_BTD, start_B, length: int, adapters: Adapters):
    """`answer_states` with the adapters of some prompts, from the prefix's output."""
    if adapters.answer is None:
        return answer_states(model, hidden_BTD, start_B, length, adapters.suffix)
    inputs = question_and_answer(model, hidden_BTD, start_B, length, hidden_BTD.shape[1])
    return answer_states(model, inputs, start_B, length, adapters.answer)


def answer_logits(model: FrozenModel, hidden_BTD, start_B, length: int, adapters: Adapters):
    """logits_BAV at the `length` positions from `start_B` on, given the prefix's output."""
    hidden_BAD = states_beside(model, hidden_BTD, start_B, length, adapters)
    with jax.named_scope("logits"):
        return sharding.constrain(transformer.unembed(model.decoder, model.params, hidden_BAD), "batch", None, "vocab")


def map_questions(model: FrozenModel, questions: Sequence[str], function: Callable[[Any, Any], Any]) -> Any:
    """`function(prompt_BT, length_B)` over many questions in batches of few shapes; results in the questions' order.

    Results are pytrees of arrays with a leading axis B, which are concatenated. Shows a progress bar if it takes long.
    """
    parts, order = [], []
    options = {"desc": "reading", "unit": "question", "delay": processes.LONG_SECONDS, "leave": False}
    with processes.progress_bar(total=len(questions), **options) as bar:
        for bucket in batches.prompts(questions, model.tokenizer):
            for index_B in batches.in_order(len(bucket.index_F), min(model.reading_batch, len(bucket.index_F))):
                valid_B = index_B >= 0
                part = function(bucket.tokens_FT[index_B], bucket.length_F[index_B])
                parts.append(jax.tree.map(lambda x, valid_B=valid_B: np.asarray(x)[valid_B], part))
                order.append(bucket.index_F[index_B[valid_B]])
                bar.update(int(valid_B.sum()))
    order = np.argsort(np.concatenate(order))
    return jax.tree.map(lambda *x: np.concatenate(x)[order], *parts)
