"""Where the time of a step goes: to the named scopes in which it is spent."""

import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shared import profiles


def test_time_goes_to_the_scope_that_spends_it():
    @jax.jit
    def program(x):
        def loss(x):
            with jax.named_scope("attention"):
                for _ in range(8):
                    x = jnp.tanh(x @ x)
            with jax.named_scope("logits"):
                return jnp.sum(x[:8] @ x)

        value, gradient = jax.value_and_grad(loss)(x)
        return value + jnp.linalg.norm(gradient)

    x = np.random.default_rng(0).normal(size=(384, 384)).astype(np.float32) / 20
    compiled = program.lower(x).compile()
    found = profiles.milliseconds_by_scope(compiled, lambda: jax.block_until_ready(compiled(x)))
    assert found["attention"] > 4 * found["logits"] > 0
    assert found["attention, backward"] > found["attention"]  # two products for one
    assert set(found) <= {"attention", "attention, backward", "logits", "logits, backward", "other"}


def test_the_study(tmp_path):
    flags = "--batch=4", "--steps=memory_all,memory_answer", "--config.memory.num_experts=32768"
    result = helpers.call("experiments.step_time", f"--workdir={tmp_path}", *flags)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    steps = results["steps"]
    assert list(steps) == ["memory_all", "memory_answer"] and results["num_experts"] == [2**14, 2**15]
    for row in steps.values():
        assert set(profiles.SCOPES) <= set(row["scopes"]) and min(row["scopes"].values()) > 0
        assert row["share_of_product"] == pytest.approx(row["gflops"] / results["product_gflops"])
        assert row["facts_per_second"] == pytest.approx(4e3 / row["milliseconds"])
    assert results["ratio"] > 0 and f"{results['ratio']:.3f} times as long" in result.stdout
    assert (tmp_path / "figures.png").stat().st_size > 1000


def test_any_shape_with_random_weights(tmp_path):
    """A shape of which there are no weights, which is refused without the flag."""
    flags = "--batch=4", "--steps=memory_answer", "--config.backbone.mlp_dim=96"
    result = helpers.call("experiments.step_time", f"--workdir={tmp_path / 'run'}", *flags)
    assert result.returncode == 2 and "--config.backbone.mlp_dim=96" in result.stderr
    result = helpers.call("experiments.step_time", f"--workdir={tmp_path / 'run'}", *flags, "--random_weights")
    assert result.returncode == 0, result.stderr
    assert "memory_answer" in result.stdout


def test_steps_that_do_not_exist(tmp_path):
    result = helpers.call("experiments.step_time", f"--workdir={tmp_path / 'run'}", "--steps=memory")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--steps=memory: must be" in result.stderr
    assert not (tmp_path / "run").exists()
