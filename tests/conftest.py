"""Every test: on the CPU, with implicit broadcasting of ranks refused, and with data files of its own."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax

import jax
import pytest


@pytest.fixture(autouse=True)
def no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="session")
def data_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINI_JAX_DATA", str(tmp_path_factory.mktemp("data")))
        yield
