"""A run that was killed continues to the very same numbers as one that was not."""

import shutil
import signal
import time

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FACTS

from lamini_jax import checkpoint, memory, router, runs, tuning
from lamini_jax.errors import UserError

LOSSES = ("total_F", "worst_F", "likeliest_F", "active_F")


class Killed(Exception):
    """The end of a process, as far as one that goes on can have it."""


def latest(directory):
    checkpoints = checkpoint.Checkpoints(directory)
    found = checkpoints.latest()
    checkpoints.close()
    return found


def assert_same_run(directory, other):
    """Rows, optimizer, router and log: bit for bit (all but the seconds that it took)."""
    saved, other_saved = latest(directory), latest(other)
    assert helpers.same_bits((saved.tables, saved.arrays), (other_saved.tables, other_saved.arrays))
    assert saved.extra == other_saved.extra
    log, other_log = saved.log, other_saved.log
    assert helpers.same_bits([getattr(log, name) for name in LOSSES], [getattr(other_log, name) for name in LOSSES])
    assert (log.epoch, log.steps, log.batches) == (other_log.epoch, other_log.steps, 0)
    for name in ("loss", "certified", "full_recall"):
        assert getattr(log, name) == getattr(other_log, name)


@pytest.fixture
def tune_memory(base, routing):
    def tune(directory, **options):
        config = helpers.replace(helpers.CONFIG, tuning={"epochs": options.pop("epochs", 8)})
        return runs.tune_memory(config, base, lambda: routing, FACTS, directory, "", **options)

    return tune


@pytest.fixture
def tune_lora(base):
    def tune(directory, epochs=8):
        config = helpers.replace(helpers.CONFIG, tuning={"epochs": epochs})
        return runs.tune_lora(config, base, FACTS, directory, "")

    return tune


def kill_after(epoch, monkeypatch):
    """From now on a run saves after every epoch, and ends when it has saved this one."""
    save = checkpoint.Checkpoints.save

    def save_and_die(self, tables, arrays, log, extra):
        save(self, tables, arrays, log, extra)
        if log.epoch == epoch:
            self.close()
            raise Killed

    monkeypatch.setattr(checkpoint.Checkpoints, "due", lambda self: True)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_die)


def killed_and_continued(tune, directory, epoch):
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_after(epoch, monkeypatch)
        with pytest.raises(Killed):
            tune(directory)
    assert latest(directory).log.epoch == epoch
    return tune(directory)


def test_a_larger_budget_goes_on(tune_memory, tmp_path):
    """4 epochs and then 4 more are 8 epochs."""
    tune_memory(tmp_path / "first", epochs=4)
    tune_memory(tmp_path / "first", epochs=8)
    tune_memory(tmp_path / "straight", epochs=8)
    assert_same_run(tmp_path / "first", tmp_path / "straight")
    assert latest(tmp_path / "straight").log.epoch == 8


def test_killed_memory_tuning_continues(tune_memory, tmp_path):
    """Where tuning spares certified facts, what was certified when it was killed must be known again."""

    def tune(directory):
        return tune_memory(directory, until_all_hold=True, epochs=100)

    tuned = tune(tmp_path / "straight")
    certified = tuned.log.certified
    epoch = next(number for number, count in enumerate(certified, 1) if count > 5 and number % tuning.CHECK_EVERY)
    assert certified[epoch - 1] < len(FACTS)
    continued = killed_and_continued(tune, tmp_path / "killed", epoch)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    np.testing.assert_array_equal(continued.certified_F, tuned.certified_F)


def test_killed_lora_continues(tune_lora, tmp_path):
    tune_lora(tmp_path / "straight")
    killed_and_continued(tune_lora, tmp_path / "killed", 3)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


def test_sigkill(tmp_path):
    """A real one, while a command saves its checkpoints; the budget may change, so that nobody waits for a long one."""
    facts = helpers.write_facts(tmp_path / "facts.jsonl", helpers.some_facts(6, answer_length=32))

    def arguments(name, epochs):
        return (
            "tune",
            f"--facts={facts}",
            f"--workdir={tmp_path / name}",
            "--config.memory.num_experts=4096",
            "--config.router.calibration=64",
            "--config.tuning.optimizer=adam",
            "--config.tuning.batch_size=2",
            "--config.tuning.learning_rate=1e-4",  # too low for the facts to hold before the budget ends
            f"--config.tuning.epochs={epochs}",
        )

    checkpoints = tmp_path / "killed" / "checkpoints"
    process = helpers.start(*arguments("killed", 100_000))
    while not any(path.name.isdigit() for path in checkpoints.glob("*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = latest(checkpoints).log
    assert before.epoch > 0

    for name in ("killed", "unstopped"):
        result = helpers.call(*arguments(name, before.epoch + 6))
        assert result.returncode == 3, result.stderr
    assert_same_run(checkpoints, tmp_path / "unstopped" / "checkpoints")
    assert latest(checkpoints).log.seconds[: before.epoch] == before.seconds, "it began anew"
    assert (tmp_path / "killed" / "recall.jsonl").read_text() == (tmp_path / "unstopped" / "recall.jsonl").read_text()


@pytest.fixture(scope="module")
def finished(base, routing, tmp_path_factory):
    """The checkpoints of a run of two epochs."""
    directory = tmp_path_factory.mktemp("finished") / "checkpoints"
    config = helpers.replace(helpers.CONFIG, tuning={"epochs": 2})
    runs.tune_memory(config, base, lambda: routing, FACTS, directory, "")
    return directory


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_a_half_written_checkpoint_is_ignored(copied, tune_memory):
    """What a kill leaves behind has another name than a whole one until it is whole."""
    half = copied / "12.orbax-checkpoint-tmp"
    shutil.copytree(copied / "6", half)
    for path in sorted(half.rglob("*"))[::2]:
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    assert latest(copied).log.epoch == 2
    assert tune_memory(copied, epochs=6).log.epoch == 6
    assert latest(copied).log.epoch == 6


def test_a_broken_checkpoint_is_named(copied):
    for path in (copied / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError) as error:
        latest(copied)
    assert str(copied / "6") in str(error.value) and "\n" not in str(error.value)


def test_other_keys_are_refused(copied, tune_memory, monkeypatch):
    """Another version of jax might draw other keys from the seed: then every fact would meet other experts."""
    assert memory.of_run(helpers.CONFIG, copied).routing.keys.shape == (4096, 16)
    keys_NC = np.array(router.keys(helpers.CONFIG))
    keys_NC[1234, 5] = np.nextafter(keys_NC[1234, 5], np.float32(2))
    monkeypatch.setattr(router, "keys", lambda config: jnp.asarray(keys_NC))
    with pytest.raises(UserError, match="keys"):
        memory.of_run(helpers.CONFIG, copied)
    with pytest.raises(UserError, match="keys"):
        tune_memory(copied)


def test_checksum_sees_every_bit():
    array = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    expected = checkpoint.checksum(array)
    assert checkpoint.checksum(array.copy()) == expected
    for place in range(array.size):
        for bit in (0, 13, 31):
            other = array.copy()
            other.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
            assert checkpoint.checksum(other) != expected
    assert checkpoint.checksum(array[::-1]) != expected


def some_log(epoch):
    log = tuning.new_log(3)
    log.steps, log.loss = epoch, [1 / 3] * epoch
    log.certified, log.seconds = [0] * epoch, [0.1] * epoch
    return log


def test_a_checkpoint_holds_what_was_when_it_was_saved(tmp_path):
    """It is written while the next steps take the memory of the arrays over and the log goes on."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    tree = {"rows": [jnp.arange(2_000_000.0).reshape(1000, -1)], "optimizer": [jnp.zeros(3, jnp.int32), jnp.ones(1)]}
    expected = jax.tree.map(np.array, tree)
    arrays = {"expert_ids_S": np.arange(5)}
    log = some_log(1)
    log.total_F[:] = [1, 2, np.inf]
    checkpoints.save(tree, arrays, log, {"keys": 2**32 - 1})
    for _ in range(20):
        tree = advance(tree)
        log.total_F += 1
        log.loss.append(0.0)
    jax.block_until_ready(tree)
    checkpoints.close()
    tables, found, found_log, extra = latest(tmp_path)
    assert helpers.same_bits(jax.tree.map(np.asarray, tables), expected)
    assert helpers.same_bits(found, arrays)
    assert found_log.total_F.tolist() == [1, 2, np.inf] and found_log.loss == [1 / 3]
    assert extra == {"keys": 2**32 - 1}


def test_two_checkpoints_are_kept(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for epoch in range(1, 6):
        checkpoints.save({"a": jnp.full(2, epoch)}, {}, some_log(epoch), {})
    checkpoints.save({"a": jnp.zeros(2)}, {}, some_log(5), {})  # saved already
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]
    assert latest(tmp_path).tables["a"][0].tolist() == [5, 5]


def test_no_checkpoint(tmp_path):
    assert latest(tmp_path / "new") is None


def test_arrays_of_other_shapes_are_refused():
    tree = {"a": jnp.zeros((2, 3)), "b": (jnp.ones(4), jnp.arange(5))}
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    assert helpers.same_bits(checkpoint.like(tree, saved), tree)
    for other in (saved[:-1], [*saved, saved[0]], [saved[0].T, *saved[1:]]):
        with pytest.raises(UserError, match="shapes"):
            checkpoint.like(tree, other)
