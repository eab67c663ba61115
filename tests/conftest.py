"""Every test: on the CPU, with implicit broadcasting of ranks refused, with data files and a cache of its own."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax
# Not the user's: one that all tests and the processes that they start have in common, for as long as they run.
if not {"PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"} & set(os.environ):
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lamini_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import forks
import helpers
import jax
import pytest

from lamini_jax.memory import routers
from lamini_jax.runtime import user_cache
from lamini_jax.training import MemoryMethod

os.environ.setdefault("XLA_FLAGS", helpers.HURRIED)
gc.set_threshold(*forks.GARBAGE)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Those are for a process with several devices, which `test_devices.py` starts.
collect_ignore = [] if "device_count" in os.environ.get("XLA_FLAGS", "") else ["devices"]


# Files that take long, the longest first: begun last, one of them would keep one worker busy while the others wait.
_LONG = ["test_devices", "test_remote", "test_fault_injection", "test_processes", "test_gguf_parity", "test_checkpoint"]


def pytest_collection_modifyitems(items):
    """Files that take long come first."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


@pytest.fixture(autouse=True, scope="session")
def directories(tmp_path_factory):
    """Datasets, and what is kept in the cache."""
    user_cache.use(user_cache.default())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINI_JAX_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def model():
    """A small backbone with random weights, two of its four layers with memory."""
    return helpers.make_model()


@pytest.fixture(scope="session")
def router(model):
    """The router of `helpers.FACTS`."""
    return routers.train(helpers.CONFIG, model, helpers.QUESTIONS)


@pytest.fixture(scope="session")
def method(model, router):
    """Memory tuning of `helpers.FACTS`, 20 of one length; the last batch of an epoch is half empty."""
    selection = routers.select_facts(model, router, helpers.QUESTIONS, helpers.CONFIG.memory.top_k)
    return MemoryMethod.create(helpers.CONFIG, model, helpers.FACTS, selection)
