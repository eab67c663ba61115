"""Kills a run, or fails one of its writes, at every point where it changes a file, one run for each.

    python tests/faults/inject.py --runs=120 [--first=1] [--every=1]

For operation N = 1, 2, ... under the work directory, `tune` is run three times from nothing: killed at N, with an I/O
error at N, and with a full disk at N. Then whatever is there must be readable, and running again must reach the numbers
of a run that nothing disturbed, bit for bit. Prints a line per kind of fault with counts, and exits with 1 if anything
was lost. `faults.c`, which it compiles, is what makes operations fail.
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
    "--config.memory.num_experts=4096",
    "--config.router.calibration_questions=64",
    "--config.tuning.optimizer.name=adam",
    "--config.tuning.optimizer.learning_rate=0.1",
    "--config.tuning.batch_size=2",
)


def library(directory: Path) -> Path:
    """The compiled `faults.c`."""
    path = directory / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, HERE / "faults.c", "-ldl"], check=True)
    return path


def tune(facts: Path, workdir: Path, log: Path | None = None, at: int = 0, error: int = 0) -> tuple[int, str]:
    """Runs `tune` in a fork; its status (negative: the signal that ended it) and what it said on stderr."""
    import refusals

    os.environ |= {"FAULT_UNDER": str(workdir), "FAULT_AT": str(at), "FAULT_ERROR": str(error)}
    if log:
        os.environ["FAULT_LOG"] = str(log)
    status, _, stderr = refusals.run("lamini_jax.tune", [f"--facts={facts}", f"--workdir={workdir}", *FLAGS])
    os.environ.pop("FAULT_LOG", None)
    return status, stderr


def digest(workdir: Path) -> str:
    """A hash of what a finished run leaves behind: its results but for the seconds, and every trained number."""
    script = (
        "import sys, hashlib, jax, numpy as np; from pathlib import Path\n"
        "from lamini_jax.runtime.checkpointing import Checkpoints\n"
        "saved = Checkpoints(Path(sys.argv[1]) / 'checkpoints').latest()\n"
        "print(hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(saved.tables))).hexdigest())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = [sys.executable, "-c", script, str(workdir)]
    trained = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=HERE.parents[1])
    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    return hashlib.sha256(f"{trained.stdout}{results}".encode()).hexdigest()


def disturb(facts: Path, workdir: Path, at: int, error: int, expected: str) -> str | None:
    """One disturbed run and what follows; what went wrong, or None."""
    status, stderr = tune(facts, workdir, None, at, error)
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    if "Traceback" in stderr or (error and status and len(lines) != 1):
        return f"status {status}, said: {stderr[-500:]}"
    status, stderr = tune(facts, workdir)
    if status:
        return f"cannot continue, status {status}: {stderr[-500:]}"
    return None if digest(workdir) == expected else "continued to other numbers"


def main(runs: int, first: int, every: int) -> int:
    """The number of runs that lost something."""
    for name in ("api", "configure", "training"):
        __import__(f"lamini_jax.{name}")
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    facts, log = directory / "facts.jsonl", directory / "count"
    facts.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in FACTS))
    status, stderr = tune(facts, directory / "whole", log)
    assert status == 0, stderr
    operations, expected = int(log.read_text()), digest(directory / "whole")
    points = range(first, operations + 1, every)[: max(runs // len(KINDS), 1)]
    failures = 0
    for kind, error in KINDS.items():
        lost = []
        for at in points:
            workdir = directory / "run"
            if trouble := disturb(facts, workdir, at, error, expected):
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
    sys.exit(bool(main(**vars(parser.parse_args()))))
