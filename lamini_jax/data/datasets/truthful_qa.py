"""TruthfulQA's questions with their best answers, from the CSV in `--config.data.dir`, downloaded if that is empty."""

import http.client
import json
import os
import pathlib
import urllib.request

from lamini_jax.data.benchmarks import TRUTHFUL_QA_FILE, TRUTHFUL_QA_URL, truthful_qa_rows
from lamini_jax.data.datasets import data_home, digest
from lamini_jax.errors import UserError

SIZE = None
ANSWERS_ARE_RANDOM = False


def fingerprint(seed: int, directory: str) -> str:
    """What was read from the file. Raises UserError if it is missing or something else."""
    return digest(json.dumps(pairs(seed, directory)).encode())


def pairs(seed: int, directory: str) -> list[tuple[str, str]]:
    """The questions and answers in the file's order."""
    content, origin = _read(pathlib.Path(directory).expanduser()) if directory else _download()
    return _parse(content, origin)


def _read(directory: pathlib.Path) -> tuple[bytes, str]:
    path = directory / TRUTHFUL_QA_FILE
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise UserError(
            f"--config.data.dir={directory}: has no {TRUTHFUL_QA_FILE} that can be read; "
            "name the folder that holds it, or leave this empty to download it"
        ) from error


def _download() -> tuple[bytes, str]:
    """The file, kept from then on; tfds's own downloader retries for minutes where there is no network."""
    path = data_home() / "downloads" / TRUTHFUL_QA_FILE
    if path.exists():
        return path.read_bytes(), str(path)
    try:
        with urllib.request.urlopen(TRUTHFUL_QA_URL, timeout=30) as response:
            content = response.read()
        _parse(content, TRUTHFUL_QA_URL)  # what is no CSV must not be kept
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"--config.data.dir is empty and {TRUTHFUL_QA_URL} cannot be downloaded ({error}); "
            f"fetch it elsewhere and name the folder that holds {TRUTHFUL_QA_FILE}"
        ) from error
    return content, str(path)


def _parse(content: bytes, origin: str) -> list[tuple[str, str]]:
    return [(question, best) for question, best in truthful_qa_rows(content, origin, ("Question", "Best Answer"))]
