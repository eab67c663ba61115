"""Other libraries' searches, for the benchmark to run beside ours where they are installed."""

from collections.abc import Callable

import numpy as np

Search = Callable[[np.ndarray, int], np.ndarray]  # query_BC, k -> ids_BK


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


def torch_product(half_keys_2SC: np.ndarray) -> Search:
    """Product keys as they are usually written: the k best of each half, then of all k * k pairs of those."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    first_SC, second_SC = torch.tensor(half_keys_2SC).to(device)
    num_half = first_SC.shape[0]

    @torch.inference_mode()
    def search(query_BC, k):
        first_BC, second_BC = torch.from_numpy(query_BC).to(device).chunk(2, dim=1)
        first_BK, first_ids_BK = torch.topk(first_BC @ first_SC.T, min(k, num_half))
        second_BK, second_ids_BK = torch.topk(second_BC @ second_SC.T, min(k, num_half))
        sums_BX = (first_BK[:, :, None] + second_BK[:, None, :]).flatten(1)
        ids_BX = (first_ids_BK[:, :, None] * num_half + second_ids_BK[:, None, :]).flatten(1)
        return ids_BX.gather(1, torch.topk(sums_BX, k)[1]).cpu().numpy()

    return search


# name -> (the module it needs, the lookup of ours that it stands beside, how its index is made)
PEERS = {
    "faiss_flat": ("faiss", "exact", faiss_flat),
    "torch_flat": ("torch", "exact", torch_flat),
    "torch_product": ("torch", "product", torch_product),
}
