"""From a question to its experts: feature -> query -> lookup -> gates, frozen after one epoch of training.

The feature is the mean of the frozen prefix's hidden states over the question. Those means are nearly parallel for
different questions, so they are whitened with the covariance of a calibration set; without that, look-alike questions
would share almost all their experts. For product keys, a query is two queries, one for each table of half-keys.
"""

import functools
import itertools
import math
from collections.abc import Iterator

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

from lamini_jax import lookup, sharding
from lamini_jax.config import Config, RouterConfig

# How sharply the training objective weighs the nearest neighbours of a query over the others.
_SHARPNESS = 8.0
_BATCH = 256
# The parts of a query, each of which has keys of its own.
_PARTS = {"exact": 1, "approximate": 1, "product": 2}


@flax.struct.dataclass
class Router:
    """Everything that decides a selection, beside the backbone."""

    mean_D: jax.Array
    transform_DC: jax.Array  # whitening and projection in one
    keys: jax.Array  # keys_NC, or for product keys half_keys_2SC
    num_experts: int = flax.struct.field(pytree_node=False)  # on a mesh there may be more keys
    lookup: str = flax.struct.field(pytree_node=False, default="exact")


@flax.struct.dataclass
class Selection:
    """The experts of each question and the weight of each."""

    expert_ids_BK: jax.Array
    gates_BK: jax.Array


def pool(hidden_BTD, length_B):
    """feature_BD: the mean over each question's tokens of hidden states of unit root mean square."""
    mask_BT1 = (jnp.arange(hidden_BTD.shape[1])[None] < length_B[:, None])[..., None]
    rms_BT1 = jnp.sqrt(jnp.mean(jnp.square(hidden_BTD), axis=-1, keepdims=True) + 1e-6)
    return jnp.sum(hidden_BTD / rms_BT1 * mask_BT1, axis=1) / length_B[:, None]


def query(mean_D, transform_DC, feature_BD, lookup: str):
    """query_BC of unit length, in full float32; for product keys, both halves weigh the same."""
    centred_BD = feature_BD - mean_D[None]
    query_BC = jnp.einsum("BD,DC->BC", centred_BD, transform_DC, precision=jax.lax.Precision.HIGHEST)
    query_BHC = query_BC.reshape(query_BC.shape[0], _PARTS[lookup], -1)
    query_BHC = query_BHC / (jnp.linalg.norm(query_BHC, axis=-1, keepdims=True) + 1e-6)
    return query_BHC.reshape(query_BC.shape) * _PARTS[lookup] ** -0.5


def select(router: Router, feature_BD, num_selected: int) -> Selection:
    """The experts whose keys lie nearest. Gates are equal: each of K experts weighs 1/sqrt(K)."""
    with jax.named_scope("lookup"):
        query_BC = query(router.mean_D, router.transform_DC, feature_BD, router.lookup)
        query_BC = sharding.constrain(query_BC)  # the same on every device, so that all of them agree
        expert_ids_BK, _ = lookup.find(router.lookup, router.keys, query_BC, num_selected, router.num_experts)
    return Selection(expert_ids_BK, jnp.full(expert_ids_BK.shape, num_selected**-0.5))


def keys(config: Config):
    """keys_NC (or half_keys_2SC with N = S^2): random signs, of unit length.

    Signs spread as well as random directions do, and no device rounds them: the same seed makes the same keys on all.
    """
    num_experts, width = config.memory.num_experts, config.router.key_width
    if config.router.lookup == "product":
        return _signs(np.uint32(config.seed), (2, math.isqrt(num_experts), width // 2), (None, None, None))
    return _signs(np.uint32(config.seed), (sharding.padded(num_experts, "keys"), width), ("keys", None))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _signs(seed, shape: tuple[int, ...], axes: sharding.Names):
    """Each drawn where it lies, and the same whatever N is rounded up to."""
    key = jax.random.fold_in(jax.random.key(seed), 4)
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 32)), jnp.uint32)
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * len(shape) + (-1,))
    bits = (words[..., None] >> shifts) & 1
    bits = bits.reshape(*shape[:-1], -1)[..., : shape[-1]]
    length = shape[-1] ** -0.5
    return sharding.constrain(jnp.where(bits == 1, length, -length), *axes)


def make(config: Config, mean_D, transform_DC) -> Router:
    """The router with this projection, ready on the devices."""
    c = config.router
    return Router(sharding.put(mean_D), sharding.put(transform_DC), keys(config), config.memory.num_experts, c.lookup)


def whitening(features_QD: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and symmetric whitening matrix of some features; `ridge` is relative to the largest variance."""
    features_QD = np.asarray(features_QD, np.float64)
    mean_D = features_QD.mean(axis=0)
    variances_D, axes_DD = np.linalg.eigh(np.cov(features_QD, rowvar=False))
    scale_D = 1 / np.sqrt(np.maximum(variances_D, 0) + ridge * max(variances_D.max(), 1e-12))
    return mean_D.astype(np.float32), (axes_DD * scale_D @ axes_DD.T).astype(np.float32)


def projections(config: Config, features_QD: np.ndarray, whiten: bool = True) -> Iterator[tuple]:
    """mean_D and transform_DC before any training, then after each epoch of it over the calibration questions.

    The paper trains its cross attention on the language model's loss. Here experts start at exactly zero, so that this
    loss has no gradient with respect to the selection; queries are trained for what a selection is for, to keep
    questions apart: the objective is the uniformity of arXiv 2005.10242.
    """
    c: RouterConfig = config.router
    width = features_QD.shape[1]
    projection_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    raw = np.zeros(width, np.float32), np.eye(width, dtype=np.float32)
    mean_D, white_DD = whitening(features_QD, c.ridge) if whiten else raw
    projection_DC = jax.random.normal(projection_key, (width, c.key_width)) * width**-0.5
    batch = min(_BATCH, len(features_QD))
    tx = optax.adam(c.learning_rate)

    def loss(projection_DC, feature_BD):
        query_BC = query(mean_D, white_DD @ projection_DC, feature_BD, c.lookup)
        query_BHC = query_BC.reshape(batch, _PARTS[c.lookup], -1)  # each part has to keep questions apart by itself
        cosine_HBB = jnp.einsum("BHC,XHC->HBX", query_BHC, query_BHC) * _PARTS[c.lookup] - 2 * jnp.eye(batch)[None]
        return jnp.mean(jax.nn.logsumexp(_SHARPNESS * cosine_HBB, axis=-1))

    @jax.jit
    def step(projection_DC, state, feature_BD):
        updates, state = tx.update(jax.grad(loss)(projection_DC, feature_BD), state)
        return optax.apply_updates(projection_DC, updates), state

    state, rng = tx.init(projection_DC), np.random.default_rng((config.seed, 1))
    while True:
        yield mean_D, white_DD @ projection_DC
        order = rng.permutation(len(features_QD))
        for start in range(0, len(order) - batch + 1, batch):
            projection_DC, state = step(projection_DC, state, features_QD[order[start : start + batch]])


def train(config: Config, features_QD: np.ndarray) -> Router:
    """Whitens, then trains the projection for one epoch, then freezes (section 7.1)."""
    _, trained = itertools.islice(projections(config, features_QD), 2)
    return make(config, *trained)


def spread(expert_ids_FK: np.ndarray, num_experts: int) -> dict[str, float]:
    """How a selection spreads: experts used, load F*K/N, and the share of experts that facts have in common."""
    count, k = expert_ids_FK.shape
    facts_X = np.repeat(np.arange(count), k)
    selected_FN = scipy.sparse.csr_array((np.ones(count * k, np.int32), (facts_X, expert_ids_FK.ravel())))
    # Sparse, because hardly any two of many facts share an expert.
    shared_FF = (selected_FN @ selected_FN.T).tocsr()
    shared_FF.setdiag(0)
    return {
        "experts_used": int(np.unique(expert_ids_FK).size),
        "load": count * k / num_experts,
        "mean_overlap": float(shared_FF.sum() / (k * count * max(count - 1, 1))),
        "nearest_overlap": float(shared_FF.max(axis=1).toarray().mean() / k),
    }
