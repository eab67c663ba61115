"""Tables of questions and answers on the disk, as tensorflow_datasets builders that need no TensorFlow.

Each is prepared once, in a folder with its name. The name must reflect everything that the contents depend on.
"""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds
from absl import logging

from lamini_jax.errors import UserError

_BLOCK = 1024  # rows read at a time


@dataclasses.dataclass(kw_only=True)
class _Contents(tfds.core.BuilderConfig):
    pairs: Iterable[tuple[str, str]]


class Facts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One split, `train`, in the order of the pairs."""

    VERSION = tfds.core.Version("1.0.0")
    # tfds downloads nothing here, and looking for its checksums needs a package that it does not install.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("question", "answer")})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (question, answer) in enumerate(self.builder_config.pairs):
            yield index, {"question": question, "answer": answer}


def prepared(home: pathlib.Path, name: str, pairs: Iterable[tuple[str, str]]) -> Facts:
    """The table of this name under `home`/tfds, which is made of the pairs if it is not there yet."""

    def builder() -> Facts:
        contents = _Contents(name=name, pairs=pairs)
        return Facts(data_dir=home / "tfds", config=contents, file_format="array_record")

    with _quiet():
        try:
            builder().download_and_prepare()  # does nothing where that was done
        except OSError as error:
            # If another process was faster, renaming onto its folder has failed.
            if not builder().is_prepared():
                reason = f"cannot keep datasets there ({error.strerror}); set LAMINI_JAX_DATA to another folder"
                raise UserError(f"{home}: {reason}") from error
        # A new one, because a builder reads the disk only when it is made.
        return builder()


def size(table: Facts) -> int:
    """How many rows a prepared table has."""
    return table.info.splits["train"].num_examples


def rows(table: Facts, start: int) -> Iterator[tuple[str, str]]:
    """The questions and answers of a prepared table from row `start` on, read as they are needed."""
    with _quiet():
        source = table.as_data_source(split="train")
    for first in range(start, size(table), _BLOCK):
        with _quiet():
            block = source.__getitems__(range(first, min(first + _BLOCK, size(table))))
        yield from ((row["question"].decode(), row["answer"].decode()) for row in block)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides tfds's progress bars, its prints and its warning that our configurations are not its own."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
