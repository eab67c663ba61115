"""The frozen language model as the rest of the package sees it: weights, tokenizer, and what it computes of a text."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import checkpoints, transformer
from lamini_jax.backbone.tokenizer import Tokenizer
from lamini_jax.config import Config
from lamini_jax.data import batches
from lamini_jax.runtime import processes, sharding


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

    @property
    def max_seq_len(self) -> int:
        return self.decoder.config.max_seq_len


def load(config: Config) -> FrozenModel:
    """The backbone that `config` names. Raises UserError if its weights have another shape."""
    decoder = transformer.Decoder(config.backbone, config.memory.num_layers, config.execution.remat)
    source = checkpoints.format_of(config.backbone.path)
    parts = source.load_split(decoder), decoder, source.load_tokenizer(config.backbone)
    return FrozenModel(*parts, source.fingerprint(config.backbone.path), config.execution.reading_batch)


@jax.jit
def read_prefix(model: FrozenModel, tokens_BT):
    """hidden_BTD: the output of the frozen prefix for some tokens, which is computed once per fact and kept."""
    return transformer.prefix(model.decoder, model.params, tokens_BT)[0]


def token_losses(model: FrozenModel, hidden_BTD, start_B, targets_BA, suffix_adapter):
    """loss_BA in nats of an answer's tokens given the prefix's output, and whether greedy decoding would choose each.

    `start_B` is the position that predicts the first of them. Logits are computed for them alone: with a large
    vocabulary those of all positions would cost more than the suffix does.
    """
    logits_BAV = answer_logits(model, hidden_BTD, start_B, targets_BA.shape[1], suffix_adapter)
    with jax.named_scope("logits"):
        right_BA = jnp.take_along_axis(logits_BAV, targets_BA[:, :, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits_BAV, axis=-1) - right_BA, right_BA >= logits_BAV.max(axis=-1)


def answer_logits(model: FrozenModel, hidden_BTD, start_B, length: int, suffix_adapter):
    """logits_BAV at the `length` positions from `start_B` on, given the prefix's output."""
    with jax.named_scope("suffix"):
        hidden_BTD, _ = transformer.suffix(model.decoder, model.params, hidden_BTD, adapter=suffix_adapter)
    with jax.named_scope("logits"):
        positions_BA1 = (start_B[:, None] + jnp.arange(length)[None])[:, :, None]
        hidden_BAD = jnp.take_along_axis(hidden_BTD, jnp.minimum(positions_BA1, hidden_BTD.shape[1] - 1), axis=1)
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
