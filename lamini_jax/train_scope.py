"""Trains the scope of a backbone: what decides whether a question asks for a stored fact.

    python -m lamini_jax.train_scope [--config=FILE] [--config.backbone.path=DIR] [--pairs=A.jsonl,B.jsonl] [--output=F]

The backbones for which one ships need none. It learns from generated questions, and from files of lines {"question":
"...", "rephrased": ["..."], "others": ["..."]}: the same asked in other words, and what looks like it and must not be
taken for it. It is kept in the user's cache, where later commands find it, or written to F. Printed is how many of the
rephrased and mistyped questions it finds at some shares of false fires, by judges that other records have taught.
"""

from pathlib import Path

from absl import flags

from lamini_jax.backbone import frozen_model
from lamini_jax.configure import configure
from lamini_jax.data import question_pairs, world_pairs
from lamini_jax.errors import UserError
from lamini_jax.memory import scope
from lamini_jax.memory.scope import fitting
from lamini_jax.runtime import cli, processes, workdir

_CONFIG = cli.define_config()
cli.define_processes()
_PAIRS = flags.DEFINE_list("pairs", [], "JSONL files with questions, rephrased ones and others.")
_OUTPUT = flags.DEFINE_string("output", None, "File for the scope.")
_GENERATED = 2000


def main() -> None:
    if _OUTPUT.value is not None:
        workdir.check_output("output", _OUTPUT.value)
    given = {pairs: question_pairs.read(pairs) for pairs in _PAIRS.value}
    config = configure(_CONFIG.value)
    cli.start(config.execution.mesh)
    model = frozen_model.load(config)
    path = Path(_OUTPUT.value) if _OUTPUT.value is not None else scope.trained_path(model.fingerprint)
    if path is None:
        raise UserError("nothing can be kept without a cache directory; give --output=FILE")
    if config.backbone.path:
        sources = {"generated": question_pairs.related(_GENERATED, config.seed)}
    else:  # this one knows nothing but the generated world
        sources = {"world": world_pairs.related(_GENERATED, config.seed)}
    sources |= given
    trained, told = fitting.train(config, model, [*sources.values()])
    if processes.is_primary():
        scope.write(path, trained)
    names = [f"{name}, {size} stored" for name in sources for size in fitting.SIZES]
    for name, line in zip(names, told, strict=True):
        processes.print_once(f"{name}: {line}")
    processes.print_once(f"scope {trained.judge.identity} in {path}")


if __name__ == "__main__":
    cli.run(main)
