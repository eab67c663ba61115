"""A run that was killed continues to the very same numbers as one that was not."""

import shutil
import signal
import time

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FACTS, latest

from lamini_jax import training
from lamini_jax.config import identity
from lamini_jax.errors import OTHER_RUN, UserError
from lamini_jax.index import exact
from lamini_jax.memory import storage
from lamini_jax.runtime import checkpointing
from lamini_jax.runtime.checkpointing import Checkpoints
from lamini_jax.training import loop
from lamini_jax.training.data import DeviceFacts, HostFacts


class Killed(Exception):
    """The end of a process, as far as a process that lives on can have it."""


def epoch_of(directory):
    return helpers.progress_of(latest(directory)).epoch


def assert_same_run(directory, other, but=("seconds",)):
    """Experts, optimizer, router and progress: bit for bit (all but the seconds that it took)."""
    saved, other_saved = latest(directory), latest(other)
    assert helpers.same_bits((saved.tables, saved.arrays), (other_saved.tables, other_saved.arrays))
    for record in (saved.record, other_saved.record):
        assert record["progress"]["batches"] == 0
        for name in but:
            del record["progress"][name]
    assert saved.record == other_saved.record


@pytest.fixture
def tune_memory(model, router):
    def tune(directory, epochs=8, until_all_hold=False):
        config = helpers.replace(helpers.CONFIG, tuning={"epochs": epochs})
        return training.memory_run(config, model, FACTS, directory, "", router, until_all_hold).result()

    return tune


@pytest.fixture
def tune_lora(model):
    def tune(directory, epochs=8):
        config = helpers.replace(helpers.CONFIG, tuning={"epochs": epochs})
        return training.lora_run(config, model, FACTS, directory, "").result()

    return tune


def killed_and_continued(tune, directory, epoch):
    """It saves after every epoch, and ends when it has saved this one."""
    save = Checkpoints.save

    def save_and_die(self, step, tables, arrays, record):
        save(self, step, tables, arrays, record)
        if len(record["progress"]["loss"]) == epoch:
            self.close()
            raise Killed

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Checkpoints, "due", lambda self: True)
        monkeypatch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            tune(directory)
    assert epoch_of(directory) == epoch
    return tune(directory)


def test_a_larger_budget_continues(tune_memory, tmp_path):
    """4 epochs and then 4 more are 8 epochs."""
    tune_memory(tmp_path / "first", epochs=4)
    tune_memory(tmp_path / "first", epochs=8)
    tune_memory(tmp_path / "straight", epochs=8)
    # The check at the end of a budget counts what is lost, and in the middle of a longer one there is none.
    assert_same_run(tmp_path / "first", tmp_path / "straight", but=("seconds", "lost"))
    assert epoch_of(tmp_path / "straight") == 8


def test_killed_memory_tuning_continues(tune_memory, tmp_path):
    """Where tuning spares certified facts, what was certified when it was killed must be known again."""

    def tune(directory):
        return tune_memory(directory, until_all_hold=True, epochs=100)

    tuned = tune(tmp_path / "straight")
    certified = tuned.progress.certified
    epoch = next(number for number, count in enumerate(certified, 1) if count > 5 and number % loop.CHECK_EVERY)
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
            *helpers.PAPER,
            "--config.memory.num_experts=4096",
            "--config.router.calibration_questions=64",
            "--config.tuning.optimizer.name=adam",
            "--config.tuning.batch_size=2",
            "--config.tuning.optimizer.learning_rate=1e-4",  # too low for the facts to hold before the budget ends
            f"--config.tuning.epochs={epochs}",
        )

    checkpoints = tmp_path / "killed" / "checkpoints"
    process = helpers.start(*arguments("killed", 100_000))
    while not any(checkpoints.glob("manifest-*.json")):  # from which on a checkpoint counts
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = helpers.progress_of(latest(checkpoints))
    assert before.epoch > 0

    both = [helpers.start(*arguments(name, before.epoch + 6)) for name in ("killed", "unstopped")]
    for result in map(helpers.finish, both):
        assert result.returncode == 3, result.stderr
    assert_same_run(checkpoints, tmp_path / "unstopped" / "checkpoints")
    seconds = latest(checkpoints).record["progress"]["seconds"]
    assert seconds[: before.epoch] == before.seconds, "it began anew"
    assert (tmp_path / "killed" / "recall.jsonl").read_text() == (tmp_path / "unstopped" / "recall.jsonl").read_text()


@pytest.fixture(scope="module")
def finished(model, router, tmp_path_factory):
    """The checkpoints of a run of two epochs."""
    directory = tmp_path_factory.mktemp("finished") / "checkpoints"
    config = helpers.replace(helpers.CONFIG, tuning={"epochs": 2})
    training.memory_run(config, model, FACTS, directory, "", router).result()
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
    assert epoch_of(copied) == 2
    assert tune_memory(copied, epochs=6).progress.epoch == 6
    assert epoch_of(copied) == 6


def test_a_broken_checkpoint_is_named(copied):
    for path in (copied / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError) as error:
        latest(copied)
    assert str(copied / "6") in str(error.value) and "\n" not in str(error.value)


def test_other_keys_are_refused(copied, tune_memory, monkeypatch):
    """Another version of jax might draw other keys from the seed: then every fact would meet other experts."""
    keys = storage.load_run(helpers.CONFIG, copied).router.keys
    keys_NC = np.array(keys)
    keys_NC[1234, 5] = np.nextafter(keys_NC[1234, 5], np.float32(2))
    monkeypatch.setattr(exact._flat._keys, "random_signs", lambda *arguments: jnp.asarray(keys_NC))
    with pytest.raises(UserError, match="keys"):
        storage.load_run(helpers.CONFIG, copied)
    with pytest.raises(UserError, match="keys"):
        tune_memory(copied)


def test_a_run_continues_where_there_is_less_room(model, copied, tmp_path):
    """How it is carried out is no part of a run: its facts may move to the host's memory, to the same bits."""
    directories = copied, shutil.copytree(copied, tmp_path / "moved")
    kinds, identities = [], []
    for directory, cache_gb in zip(directories, (4.0, 0.0), strict=True):
        config = helpers.replace(helpers.CONFIG, tuning={"epochs": 3}, execution={"cache_gb": cache_gb})
        run = training.memory_run(config, model, FACTS, directory, "")
        kinds.append(type(run.method.data.buckets[0]))
        identities.append(identity(config))
        run.result()
    assert kinds == [DeviceFacts, HostFacts] and identities[0] == identities[1]
    assert_same_run(*directories)


def test_another_backbone_is_refused(model, copied):
    """Its experts would mean nothing there."""
    other = model.replace(fingerprint="0123456789abcdef")
    with pytest.raises(UserError, match="another backbone") as error:
        training.memory_run(helpers.CONFIG, other, FACTS, copied, "")
    assert str(copied) in str(error.value) and error.value.status == OTHER_RUN
    with pytest.raises(UserError, match="another backbone"):
        storage.adapter_fn(other, storage.load_run(helpers.CONFIG, copied), helpers.CONFIG)


def some_progress(epoch):
    progress = loop.new_progress(3)
    progress.steps, progress.loss = epoch, [1 / 3] * epoch
    progress.certified, progress.seconds = [0] * epoch, [0.1] * epoch
    return progress


def save(checkpoints, tables, progress, arrays, record):
    """As a run saves itself."""
    per_fact, history = progress.save()
    checkpoints.save(progress.steps, tables, {**arrays, "progress": per_fact}, {**record, "progress": history})


def test_a_checkpoint_holds_what_was_when_it_was_saved(tmp_path):
    """It is written while the next steps donate the arrays and change the progress."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    tree = {"rows": [jnp.arange(2_000_000.0).reshape(1000, -1)], "optimizer": [jnp.zeros(3, jnp.int32), jnp.ones(1)]}
    expected = jax.tree.map(np.array, tree)
    arrays, progress = {"expert_ids_S": np.arange(5)}, some_progress(1)
    progress.total_F[:] = [1, 2, np.inf]
    save(checkpoints, tree, progress, arrays, {"keys": 2**32 - 1})
    for _ in range(20):
        tree = advance(tree)
        progress.total_F += 1
        progress.loss.append(0.0)
    jax.block_until_ready(tree)
    checkpoints.close()
    saved = latest(tmp_path)
    assert helpers.same_bits(jax.tree.map(np.asarray, saved.tables), expected)
    found = helpers.progress_of(saved)
    assert found.total_F.tolist() == [1, 2, np.inf] and found.loss == [1 / 3]
    del saved.arrays["progress"], saved.record["progress"]
    assert helpers.same_bits(saved.arrays, arrays)
    assert saved.record == {"keys": 2**32 - 1}


def test_two_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, {"a": jnp.full(2, step)}, {"b": np.zeros(1)}, {})
    checkpoints.save(5, {"a": jnp.zeros(2)}, {"b": np.zeros(1)}, {})  # saved already
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5", "manifest-4.json", "manifest-5.json"]
    assert latest(tmp_path).tables["a"][0].tolist() == [5, 5]


def test_no_checkpoint(tmp_path):
    assert latest(tmp_path / "new") is None


def test_arrays_of_other_shapes_are_refused():
    tree = {"a": jnp.zeros((2, 3)), "b": (jnp.ones(4), jnp.arange(5))}
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    assert helpers.same_bits(checkpointing.restore_like(tree, saved), tree)
    for other in (saved[:-1], [*saved, saved[0]], [saved[0].T, *saved[1:]]):
        with pytest.raises(UserError, match="shapes"):
            checkpointing.restore_like(tree, other)
