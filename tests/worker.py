"""One of two processes with four devices each, for `test_processes.py`: tunes `helpers.FACTS` and says how it ended.

    python worker.py DIRECTORY EPOCHS PORT PROCESS [SIGNAL STEP]

PROCESS is 0 or 1, or `alone`. With SIGNAL, this process sends it to itself after STEP steps.
"""

import os
import sys
from pathlib import Path

import helpers
import jax

from lamini_jax import training
from lamini_jax.config import MeshConfig
from lamini_jax.errors import UserError
from lamini_jax.runtime import processes, sharding
from lamini_jax.runtime.checkpointing import Checkpoints

CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 4099})


def main(directory, epochs, port, process, signal=None, step=None):
    if process != "alone":
        processes.start(f"localhost:{port}", 2, int(process), 60)
    sharding.set_mesh(MeshConfig(2, -1) if process != "alone" else MeshConfig(-1, 1))
    assert jax.device_count() == (8 if process != "alone" else 1)
    preempted = processes.preempted

    def send_first(steps):
        if signal and steps == int(step):
            os.kill(os.getpid(), int(signal))
        return preempted(steps)

    processes.preempted = send_first
    Checkpoints.due = lambda self: False
    model = helpers.make_model(CONFIG)
    config = helpers.replace(CONFIG, tuning={"epochs": int(epochs)})
    router = helpers.random_router(CONFIG)
    tuned = training.memory_run(config, model, helpers.FACTS, Path(directory), "", router).result()
    processes.print_once(f"at the end {tuned.progress.loss[-1]}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except Exception as error:
        status = processes.lost_process_status(error)
        if status is None:
            raise
    processes.exit_process(status)
