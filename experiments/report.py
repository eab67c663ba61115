"""Runs the experiments, and makes a page that says for each of the paper's claims whether it was reproduced.

    pip install -e .[report]
    python -m experiments.report --workdir=runs/report [--only=capacity,loss_threshold] [--config=FILE]
        [--update=README.md,experiments/README.md]

runs each experiment in a directory of its own below --workdir and skips those that have finished; one that fails is
named in the page, and the others are still run. After each experiment it writes the page of all that have finished so
far: report.html (self-contained) and report.md. Verdicts are computed from the saved measurements whenever the page is
made, so that a changed rule needs no new run. --update writes them into other files too, between the lines
`<!-- verdicts -->` and `<!-- /verdicts -->`. --config and its fields are passed to every experiment. A SIGTERM ends it
with status 75, and also the experiment that is running; started again, it continues from what that had saved.

Takes 16 minutes on 2 x86-64 cores (jax 0.10.2). Expect 35 verdicts: 18 reproduced, 11 in part, 6 not (one each of
`regularization_test`, `selective_loss`, `capacity` and `retrieval_comparison`, two of `compute_requirements`), and
13,891 times a certified fact, always recalled.
"""

import base64
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments.shared import study
from experiments.shared.claims import VERDICTS
from lamini_jax.errors import PREEMPTED, UserError
from lamini_jax.runtime import cli, workdir

# In the paper's order.
EXPERIMENTS = (
    "randomization_test",
    "regularization_test",
    "loss_threshold",
    "selective_loss",
    "capacity",
    "router_training",
    "retrieval_comparison",
    "editing",
    "compute_requirements",
)
_BLOCK = re.compile("(?<=<!-- verdicts -->\n).*?(?=<!-- /verdicts -->)", re.DOTALL)


def define_flags() -> None:
    flags.DEFINE_list("only", [], f"Some of {', '.join(EXPERIMENTS)}; all by default.")
    flags.DEFINE_list("update", [], "Files whose verdicts are replaced by the page's.")


def run(name: str, directory: Path, overrides: list[str], title: str) -> dict:
    """The page's part of an experiment: its results, or the line with which it failed. Skips a finished one."""
    if part := finished(name, directory):
        print(f"{title}: done already", flush=True)
        return part
    arguments = ["-m", f"experiments.{name}", f"--workdir={directory}", *overrides]
    command = shlex.join(["python", *arguments])
    print(f"{title}: {command}", flush=True)
    with subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE) as process:
        tail, terminated = b"", []
        before = signal.signal(signal.SIGTERM, lambda *_: terminated.append(process.terminate()))
        while chunk := os.read(process.stderr.fileno(), 4096):  # its progress, as it comes
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()
            tail = (tail + chunk)[-4096:]
    signal.signal(signal.SIGTERM, before)
    if terminated:
        raise UserError(f"terminated during {name}: run again to continue", PREEMPTED)
    if process.returncode:
        lines = re.split("[\r\n]+", tail.decode(errors="replace").strip())
        failure = lines[-1] if process.returncode > 0 and lines[-1] else f"ended with status {process.returncode}"
        return {"name": name, "about": about(name), "command": command, "failure": failure}
    return finished(name, directory)


def finished(name: str, directory: Path) -> dict[str, Any] | None:
    """The page's part of a finished experiment, or None: its claims and table are made from its results now."""
    path = directory / "results.json"
    if not path.exists():
        return None
    results, experiment = json.loads(path.read_text()), importlib.import_module(f"experiments.{name}")
    part = {key: results[key] for key in ("command", "certificates", "environment", "seconds") if key in results}
    made = {"table": experiment.table(results), "claims": experiment.claims(results)}
    return {"name": name, "about": about(name), **made, **part}


def about(name: str) -> str:
    """The first line of an experiment's docstring."""
    return importlib.import_module(f"experiments.{name}").__doc__.splitlines()[0]


def pages(parts: list[dict], directory: Path) -> dict[str, str]:
    """By template name, the page as HTML (with its figures inside), as Markdown, and only the verdicts."""
    import jinja2  # here, so that `main` can say what to install

    for part in parts:
        figure = directory / part["name"] / "figures.png"
        if figure.exists():
            part["figure"] = base64.b64encode(figure.read_bytes()).decode()
    claims = [(part["name"], claim) for part in parts for claim in part.get("claims", [])]
    present = {part["name"] for part in parts}
    values = {
        "parts": parts,
        "claims": claims,
        "counts": {verdict: sum(claim.verdict == verdict for _, claim in claims) for verdict in VERDICTS},
        "environment": next((part["environment"] for part in parts if "environment" in part), {}),
        "certificates": study.sum_certificates(part["certificates"] for part in parts if "certificates" in part),
        "missing": [name for name in EXPERIMENTS if name not in present],
    }
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = "report.html", "report.md", "verdicts.md"
    return {name: templates.get_template(name).render(values) for name in names}


def update(path: Path, verdicts: str) -> None:
    """Replaces the verdicts in a file. Raises UserError if it has no place for them."""
    text = path.read_text() if path.is_file() else ""
    if not _BLOCK.search(text):
        raise UserError(f"--update={path}: has no lines <!-- verdicts --> and <!-- /verdicts -->")
    workdir.write_text(path, _BLOCK.sub(lambda _: verdicts.strip() + "\n", text))


def main(arguments: study.Arguments) -> None:
    only = arguments.flags.only
    unknown = [name for name in only if name not in EXPERIMENTS]
    if unknown:
        raise UserError(f"--only={unknown[0]}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    cli.require("report", "jinja2")
    directory = study.open_study(arguments.workdir, arguments.config)
    names = [name for name in EXPERIMENTS if not only or name in only]
    parts = {name: part for name in EXPERIMENTS if (part := finished(name, directory / name))}
    for number, name in enumerate(names, 1):
        more = []
        if name == "regularization_test" and "randomization_test" in parts:  # the same six runs
            more = [f"--study={directory / 'randomization_test'}"]
        title = f"experiment {number} of {len(names)}, {name}"
        parts[name] = run(name, directory / name, [*arguments.overrides, *more], title)
        made = pages([parts[name] for name in EXPERIMENTS if name in parts], directory)
        for kind in ("report.html", "report.md"):
            workdir.write_text(directory / kind, made[kind])
    for path in arguments.flags.update:
        update(Path(path), made["verdicts.md"])
    for part in parts.values():
        for claim in part.get("claims", []):
            print(f"{claim.verdict:<20}{part['name']:<22}{claim.paper}")
    failed = [name for name, part in parts.items() if "failure" in part]
    print(f"{directory / 'report.html'}, {directory / 'report.md'}")
    if failed:
        raise UserError(f"{', '.join(failed)} failed, as the page says; run again to continue")


if __name__ == "__main__":
    study.start(main, define_flags, on_devices=False)
