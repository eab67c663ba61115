"""One of two processes with four devices each, for `test_processes.py`: tunes `helpers.FACTS` and says how it ended.

    python worker.py DIRECTORY EPOCHS PORT PROCESS [SIGNAL STEP]

PROCESS is 0 or 1, or `alone`. With SIGNAL, this process sends it to itself after STEP steps.
"""

import os
import sys
from pathlib import Path

import helpers
import jax

from lamini_jax import checkpoint, processes, runs, sharding
from lamini_jax.config import MeshConfig
from lamini_jax.errors import UserError

CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 4099})


def main(directory, epochs, port, process, signal=None, step=None):
    if process != "alone":
        processes.start(f"localhost:{port}", 2, int(process), 60)
    sharding.use(MeshConfig(2, -1) if process != "alone" else MeshConfig(-1, 1))
    assert jax.device_count() == (8 if process != "alone" else 1)
    ask = processes.terminated

    def terminated(steps):
        if signal and steps == int(step):
            os.kill(os.getpid(), int(signal))
        return ask(steps)

    processes.terminated = terminated
    checkpoint.Checkpoints.due = lambda self: False
    base = helpers.make_base(CONFIG)
    config = helpers.replace(CONFIG, tuning={"epochs": int(epochs)})
    routing = helpers.random_router(CONFIG)
    tuned = runs.tune_memory(config, base, lambda: routing, helpers.FACTS, Path(directory), "")
    processes.say(f"at the end {tuned.log.loss[-1]}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except Exception as error:
        status = processes.lost(error)
        if status is None:
            raise
    processes.end(status)
