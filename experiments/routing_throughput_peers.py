"""Other libraries' searches, which `routing_throughput` compares with ours if they are installed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Search(NamedTuple):
    """How some queries are searched for."""

    launch: Callable[[], Any]  # returns an answer, which may not have been computed yet
    wait: Callable[[Any], Any]  # until it has
    ids: Callable[[Any], np.ndarray]  # ids_BK of an answer


class Peer(NamedTuple):
    """A search by another library."""

    module: str  # the module that it needs
    lookup: str  # our lookup that has the same keys and finds the same
    make: Callable[[np.ndarray], Callable[[np.ndarray, int], Search]]  # of keys, then of query_BC and k


def faiss_flat(keys_NC: np.ndarray) -> Callable[[np.ndarray, int], Search]:
    """faiss's exact inner-product index."""
    import faiss

    index = faiss.IndexFlatIP(keys_NC.shape[1])
    index.add(keys_NC)
    return lambda query_BC, k: Search(lambda: index.search(query_BC, k)[1], lambda _: None, np.asarray)


def torch_flat(keys_NC: np.ndarray) -> Callable[[np.ndarray, int], Search]:
    """A matrix product and `torch.topk`."""
    import torch

    keys_CN = torch.tensor(keys_NC).to(_torch_device()).T
    return lambda query_BC, k: _torch_search(lambda query_BC: torch.topk(query_BC @ keys_CN, k)[1], query_BC)


def torch_product(half_keys_2HC: np.ndarray) -> Callable[[np.ndarray, int], Search]:
    """Product keys as they are usually written: the k best of each half, then of all k * k pairs of those."""
    import torch

    first_HC, second_HC = torch.tensor(half_keys_2HC).to(_torch_device())
    num_half = first_HC.shape[0]

    def search(query_BC, k):
        first_BC, second_BC = query_BC.chunk(2, dim=1)
        first_BK, first_ids_BK = torch.topk(first_BC @ first_HC.T, min(k, num_half))
        second_BK, second_ids_BK = torch.topk(second_BC @ second_HC.T, min(k, num_half))
        sums_BX = (first_BK[:, :, None] + second_BK[:, None, :]).flatten(1)
        ids_BX = (first_ids_BK[:, :, None] * num_half + second_ids_BK[:, None, :]).flatten(1)
        return ids_BX.gather(1, torch.topk(sums_BX, k)[1])

    return lambda query_BC, k: _torch_search(lambda query_BC: search(query_BC, k), query_BC)


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_search(function: Callable, query_BC: np.ndarray) -> Search:
    import torch

    query_BC, search = torch.from_numpy(query_BC).to(_torch_device()), torch.inference_mode()(function)
    wait = torch.cuda.synchronize if query_BC.is_cuda else lambda: None
    return Search(lambda: search(query_BC), lambda _: wait(), lambda ids_BK: ids_BK.cpu().numpy())


PEERS = {
    "faiss_flat": Peer("faiss", "exact", faiss_flat),
    "torch_flat": Peer("torch", "exact", torch_flat),
    "torch_product": Peer("torch", "product", torch_product),
}
