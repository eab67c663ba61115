"""What a command says to many wrong command lines."""

from pathlib import Path

from forks import ROOT, run_all

from lamini_jax.errors import BAD_INPUT


def refuse(module: str, cases, cwd: Path = ROOT, status: int = BAD_INPUT) -> None:
    """Expects this status and one line of each case, a pair of arguments and the words that this line must have.

    The module is one of the project, or a file in `cwd`.
    """
    results = run_all([(module, *arguments) for arguments, _ in cases], cwd)
    for (arguments, words), (found, stdout, stderr) in zip(cases, results, strict=True):
        assert (found, stdout, stderr.count("\n")) == (status, "", 1), (arguments, stdout, stderr)
        assert stderr.startswith("error: "), (arguments, stderr)
        missing = [word for word in map(str, words) if word not in stderr]
        assert not missing, (arguments, stderr, missing)
