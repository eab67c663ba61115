"""The scope: whether a question asks for one of the stored facts, and for which.

An index finds the stored wordings whose keys lie nearest to the asked question's (`Scope.mean_D`, `transform_DC` and
`routers.experts.query` make keys). `Judge.scores` gives each of these candidates a score, from the texts and their
keys; one threshold, which a share of false fires decides, is for all scores.
"""

import dataclasses
import functools
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from lamini_jax.errors import UserError
from lamini_jax.memory.scope.judge import Judge
from lamini_jax.runtime import paths, user_cache

CANDIDATES = 16  # the nearest wordings, which are judged
SHIPPED = Path(__file__).parent / "judges"
_COMMAND = "python -m lamini_jax.train_scope"


@dataclasses.dataclass(frozen=True)
class Scope:
    """What is frozen beside one backbone: the whitening that makes keys, and the judge."""

    judge: Judge
    mean_D: np.ndarray
    transform_DC: np.ndarray  # symmetric
    layer: int  # whose output makes keys

    @property
    def width(self) -> int:
        """C, the floats of a key."""
        return self.transform_DC.shape[1]

    @functools.cached_property
    def identity(self) -> str:
        """A hash of all that decides keys, scores and thresholds."""
        arrays = self.mean_D.tobytes() + self.transform_DC.tobytes()
        return hashlib.sha256(self.judge.to_json().encode() + arrays + str(self.layer).encode()).hexdigest()[:16]


def load(fingerprint: str) -> Scope:
    """The scope of the backbone with this fingerprint: the user's own, else the one that ships.

    Raises UserError, with the command that trains one, if there is none.
    """
    for path in (trained_path(fingerprint), SHIPPED / f"{fingerprint}.npz"):
        if path and path.is_file():
            return read(path)
    raise UserError(f"there is no judge for this backbone yet; train one: {_COMMAND} --config.backbone.path=...")


def trained_path(fingerprint: str) -> Path | None:
    """Where the user's own scope of a backbone is kept; None if nothing can be kept."""
    folder = user_cache.folder("scopes")
    return folder and folder / f"{fingerprint}.npz"


def read(path: Path) -> Scope:
    """A scope's file. Raises UserError, with the file's name, if it is none or of other features."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            text, mean_D, triangle = str(arrays["judge"]), arrays["mean_D"], arrays["triangle"]
            layer = int(arrays["layer"])
        transform_DC = np.zeros((len(mean_D), len(mean_D)), np.float32)
        transform_DC[np.tril_indices(len(mean_D))] = triangle
        transform_DC += np.tril(transform_DC, -1).T
        return Scope(Judge.from_json(text), mean_D.astype(np.float32), transform_DC, layer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is not a scope that `{_COMMAND}` wrote") from error


def write(path: Path, scope: Scope) -> Scope:
    """Writes it, with the whitening's lower half alone in float16, and returns what `read` will.

    The file is never seen half-written. Raises UserError if it cannot be written.
    """
    halves = scope.mean_D.astype(np.float16), scope.transform_DC[np.tril_indices(len(scope.mean_D))].astype(np.float16)
    content = io.BytesIO()
    np.savez(content, judge=scope.judge.to_json(), mean_D=halves[0], triangle=halves[1], layer=scope.layer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.write(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return read(path)
