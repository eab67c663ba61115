"""Every test: on the CPU, with implicit broadcasting of ranks refused, and with data files of its own."""

import os

# Before anything imports jax. Compiled in a hurry: nothing here is timed, and compiling is most of what tests do.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import helpers
import jax
import pytest

from lamini_jax.memory import routers
from lamini_jax.training import MemoryMethod

jax.config.update("jax_numpy_rank_promotion", "raise")

# Those are for a process with several devices, which `test_devices.py` starts.
collect_ignore = [] if "device_count" in os.environ.get("XLA_FLAGS", "") else ["devices"]


@pytest.fixture(autouse=True, scope="session")
def directories(tmp_path_factory):
    """Datasets, and compiled programs that all tests and the processes they start have in common."""
    own = tmp_path_factory.getbasetemp()
    compiled = str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled")
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
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
