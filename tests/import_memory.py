"""Prints, as JSON, the bytes of memory before and at the peak of an import, and those of the parameters.

python import_memory.py DIRECTORY imports it twice and measures the second time, so that what the libraries load and
compile once is not counted.
"""

import gc
import json
import re
import sys
import threading
from pathlib import Path

import jax

from lamini_jax.backbone import checkpoints


def anonymous() -> int:
    """Bytes of this process that no file backs; mapped files are the system's to drop."""
    return 1024 * int(re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def main(directory: str):
    jax.block_until_ready(checkpoints.load_whole(directory)[1])
    gc.collect()
    before, peak, done = anonymous(), 0, threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    params = jax.block_until_ready(checkpoints.load_whole(directory)[1])
    done.set()
    sampler.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"before": before, "peak": max(peak, anonymous()), "params": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
