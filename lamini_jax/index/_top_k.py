"""The k largest of every row, each way the fastest that was found for its kind of device.

On CPUs they are found by counting: a value's place in the answer is the number of values that come before it. Among X
values these are X^2 comparisons, but vector instructions make many at once, and XLA divides the rows among the cores;
its own top-k and sort for CPUs compare one pair at a time, on one core. So that X stays small, of many values only the
members of k groups are compared, those with the largest maxima.

Letters: N float32 values in each of B rows, X of them compared, groups of G.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_MOST = 64  # the largest k for which counting is used: it takes 4 k^2 comparisons
_GROUP, _FEW = 2, 32  # so few values are compared without grouping them
_INT = np.iinfo(np.int32)


def top_k(values_BN, k: int):
    """best_BK and places_BK, of equal values the first."""
    return _by_device(_counted, _sorted, k)(values_BN)


def top_k_by_id(values_BX, ids_BX, k: int):
    """best_BK and ids_BK, of equal values those with the lowest ids, in whatever order these are; X is small."""
    return _by_device(_counted_by_id, _sorted_by_id, k)(values_BX, ids_BX)


def _by_device(on_cpu: Callable, elsewhere: Callable, k: int) -> Callable:
    """The way for the device that is compiled for."""
    if k > _MOST:
        return functools.partial(elsewhere, k=k)
    ways = {"cpu": functools.partial(on_cpu, k=k), "default": functools.partial(elsewhere, k=k)}
    return functools.partial(jax.lax.platform_dependent, **ways)


def _sorted(values_BN, k: int):
    """XLA's, whose results may be sliced: without the barrier, XLA would slice a sort instead, five times slower."""
    # A barrier for each result: with one for both, XLA's partitioner crashes (jax 0.10.2).
    return tuple(map(jax.lax.optimization_barrier, jax.lax.top_k(values_BN, k)))


def _sorted_by_id(values_BX, ids_BX, k: int):
    best_BK, places_BK = _sorted(values_BX, k)
    crowded = jnp.any(jnp.sum(values_BX >= best_BK[:, -1:], axis=1) > k)

    def by_id():
        """Of equal values at the k-th place the lowest id: sorted by id first, which takes as long as all the rest."""
        sorted_BX, values_by_id_BX = jax.lax.sort((ids_BX, values_BX), num_keys=1)
        return jnp.take_along_axis(sorted_BX, jax.lax.top_k(values_by_id_BX, k)[1], axis=1)

    ids_BK = jax.lax.cond(crowded, by_id, lambda: jnp.take_along_axis(ids_BX, places_BK, axis=1))
    return best_BK, jax.lax.sort((-best_BK, ids_BK), num_keys=2)[1]


def _counted(values_BN, k: int):
    codes_BK, places_BK = _best(_encoded(values_BN), k)
    return _decoded(codes_BK), places_BK


def _counted_by_id(values_BX, ids_BX, k: int):
    codes_BK, ids_BK = _ranked(_encoded(values_BX), ids_BX, k)
    return _decoded(codes_BK), ids_BK


def _best(codes_BN, k: int):
    """The k largest codes and their places: they are in the k groups with the largest maxima."""
    batch, width = codes_BN.shape
    if width <= max(_GROUP * k, _FEW):
        return _ranked(codes_BN, jnp.broadcast_to(jnp.arange(width)[None], codes_BN.shape), k)
    # What fills up the last group has the lowest code and the highest places.
    codes_BN = jnp.pad(codes_BN, ((0, 0), (0, -width % _GROUP)), constant_values=-_INT.max)
    codes_BNG = codes_BN.reshape(batch, -1, _GROUP)
    groups_BK1 = _best(codes_BNG.max(axis=2), k)[1][:, :, None]
    codes_BX = jnp.take_along_axis(codes_BNG, groups_BK1, axis=1).reshape(batch, -1)
    places_BX = (groups_BK1 * _GROUP + jnp.arange(_GROUP)[None, None]).reshape(batch, -1)
    return _ranked(codes_BX, places_BX, k)


def _ranked(codes_BX, ids_BX, k: int):
    """The k best codes and their ids in their order: the largest code first, of equal ones the lowest id.

    In loops over X, because XLA (jax 0.10.2) makes no vector instructions of a sum over all pairs; and if all of X is
    written out, it computes the answer again for each of its uses.
    """
    each = functools.partial(jax.lax.fori_loop, 0, codes_BX.shape[1], unroll=4)

    def column(values_BX, x):
        return jax.lax.dynamic_slice_in_dim(values_BX, x, 1, axis=1)

    def count(x, rank_BX):
        lower_BX = column(ids_BX, x) < ids_BX  # with such an id, x comes first even if their codes are equal
        return rank_BX + (column(codes_BX, x) > codes_BX - lower_BX)

    def place(x, best):
        here_BK = column(rank_BX, x) == jnp.arange(k)[None]
        codes_BK, ids_BK = best
        return jnp.where(here_BK, column(codes_BX, x), codes_BK), jnp.where(here_BK, column(ids_BX, x), ids_BK)

    rank_BX = each(count, jnp.zeros_like(codes_BX))
    return each(place, (jnp.zeros_like(codes_BX[:, :k]),) * 2)


def _encoded(values_BN):
    """Integers in the order of the values, sign and magnitude as two's complement; both zeros are 0."""
    bits_BN = jax.lax.bitcast_convert_type(values_BN, jnp.int32)
    return jnp.where(bits_BN < 0, -(bits_BN & _INT.max), bits_BN)


def _decoded(codes_BK):
    """The values that were encoded."""
    sign_BK = jnp.where(codes_BK < 0, _INT.min, 0)
    return jax.lax.bitcast_convert_type(jnp.abs(codes_BK) | sign_BK, jnp.float32)
