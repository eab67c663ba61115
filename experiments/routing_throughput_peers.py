"""Other libraries' searches, which `routing_throughput` compares with ours if they are installed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Search = Callable[[np.ndarray, int], np.ndarray]  # query_BC, k -> ids_BK


class Peer(NamedTuple):
    """A search by another library."""

    module: str  # the module that it needs
    lookup: str  # our lookup that has the same keys and finds the same
    make: Callable[[np.ndarray], Search]


def faiss_flat(keys_NC: np.ndarray) -> Search:
    """faiss's exact inner-product index."""
    import faiss

    index = faiss.IndexFlatIP(keys_NC.shape[1])
    index.add(keys_NC)
    return lambda query_BC, k: index.search(query_BC, k)[1]


def torch_flat(keys_NC: np.ndarray) -> Search:
    """A matrix product and `torch.topk`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys_CN = torch.tensor(keys_NC).to(device).T

    @torch.inference_mode()
    def search(query_BC, k):
        return torch.topk(torch.from_numpy(query_BC).to(device) @ keys_CN, k)[1].cpu().numpy()

    return search


def torch_product(half_keys_2HC: np.ndarray) -> Search:
    """Product keys as they are usually written: the k best of each half, then of all k * k pairs of those."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    first_HC, second_HC = torch.tensor(half_keys_2HC).to(device)
    num_half = first_HC.shape[0]

    @torch.inference_mode()
    def search(query_BC, k):
        first_BC, second_BC = torch.from_numpy(query_BC).to(device).chunk(2, dim=1)
        first_BK, first_ids_BK = torch.topk(first_BC @ first_HC.T, min(k, num_half))
        second_BK, second_ids_BK = torch.topk(second_BC @ second_HC.T, min(k, num_half))
        sums_BX = (first_BK[:, :, None] + second_BK[:, None, :]).flatten(1)
        ids_BX = (first_ids_BK[:, :, None] * num_half + second_ids_BK[:, None, :]).flatten(1)
        return ids_BX.gather(1, torch.topk(sums_BX, k)[1]).cpu().numpy()

    return search


PEERS = {
    "faiss_flat": Peer("faiss", "exact", faiss_flat),
    "torch_flat": Peer("torch", "exact", torch_flat),
    "torch_product": Peer("torch", "product", torch_product),
}
