"""The backbone inside the package: small, and good at what it was never shown."""

from pathlib import Path

import jax

from lamini_jax import backbone, model, recall
from lamini_jax.config import Config
from lamini_jax.data import world


def test_it_is_small():
    path = Path(backbone.__file__).parent / "weights" / "tiny.safetensors"
    config, params = backbone.shipped()
    assert path.stat().st_size <= 8e6
    assert 0.5e6 <= sum(leaf.size for leaf in jax.tree.leaves(params)) <= 2e6
    assert config.context >= 256


def test_it_is_the_default_config():
    assert backbone.shipped()[0] == Config().backbone


def test_it_answers_what_training_held_out():
    """91.3% of them, as `experiments/pretrain_backbone.py` says; these are others, ten of each kind."""
    base = model.load_base(Config())
    questions = [qa for kind in world.KINDS for qa in world.held_out(kind, 10, seed=7)]
    right = recall.accuracy(base, recall.bare, questions)
    wrong = sorted({qa.kind for qa, ok in zip(questions, right, strict=True) if not ok})
    assert sum(right) >= 0.9 * len(questions), f"{sum(right)} of {len(questions)} right; wrong in {', '.join(wrong)}"
