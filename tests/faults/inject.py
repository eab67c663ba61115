"""Kills a run, or fails one of its writes, at every point where it changes a file, one run for each.

    python tests/faults/inject.py --runs=120 [--first=1] [--every=1] [--router=facts]

For operation N = 1, 2, ... under the work directory, `tune` is run three times from nothing: killed at N, with an I/O
error at N, and with a full disk at N. Then whatever is there must be readable, and running again must reach the numbers
of a run that nothing disturbed, bit for bit. With --router=facts, it adds a fact to a memory of two and changes one,
and what is there must be the old memory or the new one. Prints a line per kind of fault with counts, and exits with 1
if anything was lost. `faults.c`, which it compiles, is what makes operations fail.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
KINDS = {"killed": 0, "I/O error": errno.EIO, "disk full": errno.ENOSPC}
FACTS = ("Who owns box 1?", "37"), ("Who owns box 2?", "74")
FLAGS = (
    "--config.router.kind=experts",
    "--config.memory.top_k=32",
    "--config.memory.dtype=float32",
    "--config.memory.num_experts=4096",
    "--config.router.calibration_questions=64",
    "--config.tuning.optimizer.name=adam",
    "--config.tuning.optimizer.learning_rate=0.1",
    "--config.tuning.batch_size=2",
)
CHANGED = ("Who owns box 1?", "38"), FACTS[1], ("Where is the key?", "B4")


def library(directory: Path) -> Path:
    """The compiled `faults.c`."""
    path = directory / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, HERE / "faults.c", "-ldl"], check=True)
    return path


def tune(
    facts: Path, workdir: Path, log: Path | None = None, at: int = 0, error: int = 0, flags=FLAGS
) -> tuple[int, str]:
    """Runs `tune` in a fork; its status (negative: the signal that ended it) and what it said on stderr."""
    import forks

    os.environ |= {"FAULT_UNDER": str(workdir), "FAULT_AT": str(at), "FAULT_ERROR": str(error)}
    if log:
        os.environ["FAULT_LOG"] = str(log)
    status, _, stderr = forks.run("lamini_jax.tune", [f"--facts={facts}", f"--workdir={workdir}", *flags])
    os.environ.pop("FAULT_LOG", None)
    return status, stderr


class PaperRun:
    """A run of the paper's router, from nothing."""

    def __init__(self, directory: Path):
        self.facts = write(directory / "facts.jsonl", FACTS)

    def begin(self, workdir: Path) -> None:
        """What is there before the run that is disturbed: nothing."""

    def tune(self, workdir: Path, *how) -> tuple[int, str]:
        """The run that is disturbed."""
        return tune(self.facts, workdir, *how)

    def lost(self, workdir: Path) -> str | None:
        """What is wrong with what a disturbed run has left: the next one says so."""

    def digest(self, workdir: Path) -> str:
        """A hash of what a run that has ended leaves behind."""
        return digest(workdir)


class FactsRun(PaperRun):
    """A change of a memory of facts, of which a checkpoint is saved, as of one that takes long."""

    def __init__(self, directory: Path):
        from lamini_jax.runtime.checkpointing import Checkpoints

        Checkpoints.due = lambda self: self.latest_step() is None
        self.old, self.facts = write(directory / "old.jsonl", FACTS), write(directory / "facts.jsonl", CHANGED)
        self.before = directory / "before"
        status, stderr = tune(self.old, self.before, flags=())
        assert status == 0, stderr
        self.known = {facts_in(self.before)}

    def begin(self, workdir: Path) -> None:
        shutil.copytree(self.before, workdir)

    def tune(self, workdir: Path, *how) -> tuple[int, str]:
        return tune(self.facts, workdir, *how, flags=())

    def lost(self, workdir: Path) -> str | None:
        found = facts_in(workdir)
        return None if found in self.known else f"neither the old memory nor the new one: {found}"

    def digest(self, workdir: Path) -> str:
        new = facts_in(workdir)
        self.known.add(new)
        left = sorted(path.name for path in workdir.iterdir() if not path.name.startswith("."))
        return f"{new} {left}"


def facts_in(workdir: Path) -> str:
    """A hash of a memory of facts, but for dates, read and checked by a process of its own."""
    script = (
        "import sys, hashlib, pickle; from lamini_jax.memory.store import *\n"
        "store = FactStore(Path(sys.argv[1])); rows = store._connection.execute('SELECT length(row) FROM experts')\n"
        "keys = store._connection.execute('SELECT length(key) FROM wordings').fetchone()[0]\n"
        "found = store.read(keys, rows.fetchone()[0]); facts = [dataclasses.replace(f, date='') for f in found.facts]\n"
        "content = repr(facts).encode() + b''.join(found.rows[i] for i in sorted(found.rows))\n"
        "print(hashlib.sha256(content + b''.join(key.tobytes() for key in found.keys)).hexdigest())"
    )
    return output_of(script, workdir)


def output_of(script: str, workdir: Path) -> str:
    """What a Python script prints about a directory, in which no operation fails."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = [sys.executable, "-c", script, str(workdir)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    return result.stdout.strip() if result.returncode == 0 else f"unreadable: {result.stderr[-300:]}"


def write(path: Path, facts) -> Path:
    """A file of facts."""
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in facts))
    return path


def digest(workdir: Path) -> str:
    """A hash of what a finished run leaves behind: its results but for the seconds, and every trained number."""
    script = (
        "import sys, hashlib, jax, numpy as np; from pathlib import Path\n"
        "from lamini_jax.runtime.checkpointing import Checkpoints\n"
        "saved = Checkpoints(Path(sys.argv[1]) / 'checkpoints').latest()\n"
        "print(hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(saved.tables))).hexdigest())"
    )
    trained = output_of(script, workdir)
    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    return hashlib.sha256(f"{trained}{results}".encode()).hexdigest()


def disturb(run: PaperRun, workdir: Path, at: int, error: int, expected: str) -> str | None:
    """One disturbed run and what follows; what went wrong, or None."""
    run.begin(workdir)
    status, stderr = run.tune(workdir, None, at, error)
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    if "Traceback" in stderr or (error and status and len(lines) != 1):
        return f"status {status}, said: {stderr[-500:]}"
    if lost := run.lost(workdir):
        return lost
    status, stderr = run.tune(workdir)
    if status:
        return f"cannot continue, status {status}: {stderr[-500:]}"
    return None if run.digest(workdir) == expected else "continued to other numbers"


def main(runs: int, first: int, every: int, router: str) -> int:
    """The number of runs that lost something."""
    for name in ("api", "configure", "training"):
        __import__(f"lamini_jax.{name}")
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    run, log = {"experts": PaperRun, "facts": FactsRun}[router](directory), directory / "count"
    run.begin(directory / "whole")
    status, stderr = run.tune(directory / "whole", log)
    assert status == 0, stderr
    operations, expected = int(log.read_text()), run.digest(directory / "whole")
    points = range(first, operations + 1, every)[: max(runs // len(KINDS), 1)]
    failures = 0
    for kind, error in KINDS.items():
        lost = []
        for at in points:
            workdir = directory / "run"
            if trouble := disturb(run, workdir, at, error, expected):
                lost.append(at)
                print(f"{kind} at operation {at}: {trouble}", flush=True)
            shutil.rmtree(workdir, ignore_errors=True)
        failures += len(lost)
        print(f"{kind}: {len(points)} runs, at {len(points)} of {operations} operations; {len(lost)} lost", flush=True)
    shutil.rmtree(directory)
    return failures


if __name__ == "__main__":
    if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as built:
            own = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": f"{built}/cache", "LD_PRELOAD": str(library(Path(built)))}
            environment = {**os.environ, **own}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("runs", 120), ("first", 1), ("every", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--router", choices=("experts", "facts"), default="experts")
    sys.exit(bool(main(**vars(parser.parse_args()))))
