"""The paper's router: a question selects the K experts with the nearest keys; it is frozen after one epoch of training.

The feature is the mean of the frozen prefix's hidden states over the question. Those means are nearly parallel for
different questions, so they are whitened with the covariance of a calibration set; without that, look-alike questions
would share almost all their experts. For product keys, a query is two queries, one for each table of half-keys.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

from lamini_jax.backbone import frozen_model, transformer
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.backbone.transformer import Known
from lamini_jax.config import Config, router_layer
from lamini_jax.data import calibration, world
from lamini_jax.errors import UserError
from lamini_jax.index import LOOKUPS
from lamini_jax.memory.routers import NO_EXPERT, Arrays, Selection
from lamini_jax.runtime import sharding, user_cache

# How sharply the training objective weighs the nearest neighbours of a query over the others.
_SHARPNESS = 8.0
_BATCH = 256


@flax.struct.dataclass
class Router:
    """Everything that decides a selection, apart from the backbone."""

    mean_D: jax.Array
    transform_DC: jax.Array  # whitening and projection in one
    keys: jax.Array  # those of the lookup
    num_experts: int = flax.struct.field(pytree_node=False)  # on a mesh there may be more keys than experts
    layer: int = flax.struct.field(pytree_node=False)
    lookup: str = flax.struct.field(pytree_node=False, default="exact")
    kind: str = flax.struct.field(pytree_node=False, default="experts")


def pool(hidden_BTD, own_BT):
    """feature_BD: the mean over each question's own tokens of hidden states of unit root mean square."""
    rms_BT1 = jnp.sqrt(jnp.mean(jnp.square(hidden_BTD), axis=-1, keepdims=True) + 1e-6)
    own_BT1 = own_BT[..., None]
    return jnp.sum(hidden_BTD / rms_BT1 * own_BT1, axis=1) / jnp.maximum(own_BT1.sum(axis=1), 1)


@functools.partial(jax.jit, static_argnames="layer")
def features(model: FrozenModel, prompt_BT, length_B, layer: int):
    """feature_BD of questions, from the output of one layer. Tokens of the prompt's format do not count."""
    own, frame = frozen_model.after_beginning(model, prompt_BT), model.tokenizer.frame
    context = model.beginning and model.beginning.prefix
    hidden_BTD = transformer.early(model.decoder, model.params, **own, layers=layer, known=Known(context=context))
    positions_BT = own["positions_BT"]
    own_BT = (positions_BT >= frame.before) & (positions_BT < length_B[:, None] - frame.after)
    return sharding.constrain(pool(hidden_BTD, own_BT))


def query(mean_D, transform_DC, feature_BD, parts: int):
    """query_BC of unit length, in full float32; all `parts` of a lookup's query have the same length."""
    centred_BD = feature_BD - mean_D[None]
    query_BC = jnp.einsum("BD,DC->BC", centred_BD, transform_DC, precision=jax.lax.Precision.HIGHEST)
    query_BHC = query_BC.reshape(query_BC.shape[0], parts, -1)
    query_BHC = query_BHC / (jnp.linalg.norm(query_BHC, axis=-1, keepdims=True) + 1e-6)
    return query_BHC.reshape(query_BC.shape) * parts**-0.5


def select(router: Router, model: FrozenModel, prompt_BT, length_B, top_k: int) -> Selection:
    """The experts with the nearest keys. Gates are equal: each of K experts has the weight 1/sqrt(K)."""
    return select_by_feature(router, features(model, prompt_BT, length_B, router.layer), top_k)


def select_by_feature(router: Router, feature_BD, top_k: int) -> Selection:
    """The same, for questions whose features are known."""
    with jax.named_scope("lookup"):
        lookup = LOOKUPS[router.lookup]
        query_BC = query(router.mean_D, router.transform_DC, feature_BD, lookup.QUERY_PARTS)
        query_BC = sharding.constrain(query_BC)  # the same on every device, so that all of them agree
        expert_ids_BK, _ = lookup.find(router.keys, query_BC, top_k, router.num_experts)
    expert_ids_BK = jnp.where(expert_ids_BK == router.num_experts, NO_EXPERT, expert_ids_BK)
    return Selection(expert_ids_BK, jnp.full(expert_ids_BK.shape, top_k**-0.5))


def queries(model: FrozenModel, router: Router, questions: Sequence[str]) -> np.ndarray:
    """query_FC of many questions: what a lookup compares with its keys."""
    feature_FD, parts = question_features(model, questions, router.layer), LOOKUPS[router.lookup].QUERY_PARTS
    return np.asarray(query(router.mean_D, router.transform_DC, feature_FD, parts))


def question_features(model: FrozenModel, questions: Sequence[str], layer: int) -> np.ndarray:
    """feature_FD of many questions."""
    return frozen_model.map_questions(model, questions, lambda *prompts: features(model, *prompts, layer))


def calibration_features(config: Config, model: FrozenModel, questions: Sequence[str]) -> np.ndarray:
    """features_QD of what a router is trained on: these questions, then generated ones, which are read once for all."""
    generated, layer = _calibration_questions(config), router_layer(config)

    def read():
        return question_features(model, generated, layer)

    tokens = [model.tokenizer.prompt(question) for question in generated]
    name = hashlib.sha256(repr((model.fingerprint, config.backbone.dtype, layer, tokens)).encode()).hexdigest()
    kept = user_cache.array(f"calibration/{name}", read) if model.fingerprint else read()
    return np.concatenate([question_features(model, questions, layer), kept])


def _calibration_questions(config: Config) -> list[str]:
    """Questions of the kind that the backbone reads: the backbone that ships knows only the generated world."""
    count = config.router.calibration_questions
    if config.backbone.path:
        return calibration.questions(count, config.seed)
    return [qa.question for qa in itertools.islice(world.training_stream(config.seed), count)]


def whitening(features_QD: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and symmetric whitening matrix of some features; `ridge` is relative to the largest variance."""
    features_QD = np.asarray(features_QD, np.float64)
    mean_D = features_QD.mean(axis=0)
    variances_D, axes_DD = np.linalg.eigh(np.cov(features_QD, rowvar=False))
    scale_D = 1 / np.sqrt(np.maximum(variances_D, 0) + ridge * max(variances_D.max(), 1e-12))
    return mean_D.astype(np.float32), (axes_DD * scale_D @ axes_DD.T).astype(np.float32)


def projections(config: Config, features_QD: np.ndarray, whiten: bool = True) -> Iterator[tuple]:
    """mean_D and transform_DC before any training, then after each epoch of training over the calibration questions.

    The paper trains its cross attention on the language model's loss. Here experts start at exactly zero, so that this
    loss has no gradient with respect to the selection. Instead, queries are trained to keep questions apart, which is
    the purpose of a selection: the objective is the uniformity of arXiv 2005.10242.
    """
    c, parts = config.router, LOOKUPS[config.router.lookup].QUERY_PARTS
    width = features_QD.shape[1]
    projection_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    raw = np.zeros(width, np.float32), np.eye(width, dtype=np.float32)
    mean_D, white_DD = whitening(features_QD, c.ridge) if whiten else raw
    projection_DC = jax.random.normal(projection_key, (width, c.key_dim)) * width**-0.5
    batch = min(_BATCH, len(features_QD))
    tx = optax.adam(c.learning_rate)

    def loss(projection_DC, feature_BD):
        query_BC = query(mean_D, white_DD @ projection_DC, feature_BD, parts)
        query_BHC = query_BC.reshape(batch, parts, -1)  # each part has to keep questions apart by itself
        cosine_HBB = jnp.einsum("BHC,XHC->HBX", query_BHC, query_BHC) * parts - 2 * jnp.eye(batch)[None]
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


def train(config: Config, model: FrozenModel, questions: Sequence[str]) -> Router:
    """Whitens, then trains the projection for one epoch, then freezes (section 7.1)."""
    _, trained = itertools.islice(projections(config, calibration_features(config, model, questions)), 2)
    return make(config, *trained)


def make(config: Config, mean_D, transform_DC) -> Router:
    """The router with this projection and new keys, on the devices."""
    return _router(config, mean_D, transform_DC, LOOKUPS[config.router.lookup].init(*_table(config)))


def save(router: Router) -> tuple[Arrays, dict[str, Any]]:
    """The projection; keys are functions of the seed, of which a hash is kept."""
    arrays = {"mean_D": np.asarray(router.mean_D), "transform_DC": np.asarray(router.transform_DC)}
    return arrays, {"keys": LOOKUPS[router.lookup].save(router.keys, router.num_experts)}


def restore(config: Config, arrays: Arrays, record: dict[str, Any]) -> Router:
    """The router that was saved. Raises UserError if the seed makes other keys now, or the arrays have other shapes."""
    lookup, width = LOOKUPS[config.router.lookup], config.backbone.embed_dim
    expected = {"mean_D": (width,), "transform_DC": (width, config.router.key_dim)}
    for name, shape in expected.items():
        if name not in arrays:
            raise UserError(f"has no tensor {name}")
        if arrays[name].shape != shape:
            raise UserError(f"{name} has shape {arrays[name].shape}; expected {shape}")
        if arrays[name].dtype != np.float32 or not np.isfinite(arrays[name]).all():
            raise UserError(f"{name} holds what is not a float32 number")
    return _router(config, arrays["mean_D"], arrays["transform_DC"], lookup.restore(*_table(config), record["keys"]))


def spec(config: Config) -> Router:
    """The router with jax.ShapeDtypeStructs, with their shardings, in place of arrays."""
    lookup, width = LOOKUPS[config.router.lookup], config.backbone.embed_dim

    def described(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding_of(axes, shape))

    keys, axes = lookup.spec(config.memory.num_experts, config.router.key_dim)
    mean_D, transform_DC = (described(shape, np.float32, ()) for shape in ((width,), (width, config.router.key_dim)))
    keys = described(keys.shape, keys.dtype, axes)
    return Router(mean_D, transform_DC, keys, config.memory.num_experts, router_layer(config), config.router.lookup)


def _table(config: Config) -> tuple[int, int, int]:
    """The arguments of a lookup's `init`, which decide the keys."""
    return config.seed, config.memory.num_experts, config.router.key_dim


def _router(config: Config, mean_D, transform_DC, keys) -> Router:
    put = sharding.put(mean_D), sharding.put(transform_DC)
    return Router(*put, keys, config.memory.num_experts, router_layer(config), config.router.lookup)


def selection_stats(expert_ids_FK: np.ndarray, num_experts: int) -> dict[str, float]:
    """How a selection is distributed: experts used, load F*K/N, and the share of experts that facts have in common."""
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
