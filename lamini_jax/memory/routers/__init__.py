"""From a question to its experts: one module per kind of router, which `--config.router.kind` names.

`facts` finds the one fact that a question asks for; it changes with every fact that is added, so that it is neither
trained nor saved as the others are. Every other kind is a module of this folder with

    train(config, model, questions) -> Router                            a pytree with a static field `kind`
    select(router, model, prompt_BT, length_B, top_k) -> Selection       traced; the only place where gates are made
    save(router) -> (arrays, record)                                     what files keep: arrays, and what JSON holds
    restore(config, arrays, record) -> Router                            the inverse. Raises UserError if it cannot be
    spec(config) -> Router                                               its arrays as jax.ShapeDtypeStructs, sharded

Training and serving both select through `select` below, so that they have the same experts with the same gates.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.errors import OTHER_RUN, UserError
from lamini_jax.runtime.registry import Registry

KINDS = Registry("lamini_jax.memory.routers", "router.kind")
NO_EXPERT = np.iinfo(np.int32).max  # an id that stands for no expert, and adds nothing

Router = Any  # of one of the kinds
Arrays = dict[str, np.ndarray]


@flax.struct.dataclass
class Selection:
    """The experts of each question, NO_EXPERT if it has none, and the weight of each."""

    expert_ids_BK: jax.Array
    gates_BK: jax.Array


class FactSelection(NamedTuple):
    """A router and what it selects for the facts of a run."""

    router: Router
    expert_ids_FK: np.ndarray
    gates_FK: np.ndarray


def train(config: Config, model: FrozenModel, questions: Sequence[str]) -> Router:
    """The router for some facts, of the kind that the config names."""
    return KINDS[config.router.kind].train(config, model, questions)


@functools.partial(jax.jit, static_argnames="top_k")
def select(router: Router, model: FrozenModel, prompt_BT, length_B, top_k: int) -> Selection:
    """The experts of questions (step 1 of section 7.1). Prompts hold no answer, so a selection depends on none."""
    return KINDS[router.kind].select(router, model, prompt_BT, length_B, top_k)


def select_facts(model: FrozenModel, router: Router, questions: Sequence[str], top_k: int) -> FactSelection:
    """The experts of many questions. Raises UserError if one of them has none, because of NaN."""
    selection = frozen_model.map_questions(
        model, questions, lambda prompt_BT, length_B: select(router, model, prompt_BT, length_B, top_k)
    )
    refused_F = np.flatnonzero((selection.expert_ids_BK == NO_EXPERT).all(axis=1))
    if refused_F.size:
        raise UserError(f"the backbone or the router makes NaN of the question {questions[refused_F[0]]!r}")
    return FactSelection(router, selection.expert_ids_BK, selection.gates_BK)


def save(router: Router) -> tuple[Arrays, dict[str, Any]]:
    """What files keep of a router: its arrays, and what is kept as JSON."""
    arrays, record = KINDS[router.kind].save(router)
    return arrays, {**record, "kind": router.kind}


def restore(config: Config, arrays: Arrays, record: dict[str, Any]) -> Router:
    """The router that was saved. Raises UserError if it cannot be made again, or is not of the config's kind."""
    if record["kind"] != config.router.kind:
        message = f"this memory was tuned with a router of kind {record['kind']}, and the config says"
        raise UserError(f"{message} --config.router.kind={config.router.kind}", status=OTHER_RUN)
    return KINDS[config.router.kind].restore(config, arrays, record)
