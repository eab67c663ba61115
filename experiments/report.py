"""Every experiment, and a page that says of each of the paper's claims whether it was reproduced.

    pip install -e .[report]
    python -m experiments.report --workdir=runs/report [--only=capacity,loss_threshold] [--config=FILE]

runs each experiment in a directory of its own below --workdir and skips those that have finished; one that fails is
named in the page, and the others go on. After each, the page of all that have finished so far is there: report.html
(self-contained) and report.md. --config and its fields go to every experiment. A SIGTERM ends it with status 75,
and the experiment that is running; started again, it goes on from what that had saved.

Takes 32 minutes and 9.2 GB on 2 x86-64 cores (jax 0.10.2). Expect 33 verdicts: 17 reproduced, 10 in part, 6 not (of
`regularization_test`, `selective_loss`, `capacity` and `retrieval_comparison` one each, of `compute_requirements` two),
and none of 12,633 certified facts wrong.
"""

import ast
import base64
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from absl import flags

from experiments.parts import study
from experiments.parts.claims import IN_PART, NOT, REPRODUCED
from lamini_jax import command
from lamini_jax.errors import PREEMPTED, UserError

# In the paper's order.
EXPERIMENTS = (
    "randomization_test",
    "regularization_test",
    "loss_threshold",
    "selective_loss",
    "capacity",
    "router_training",
    "retrieval_comparison",
    "compute_requirements",
)
VERDICTS = (REPRODUCED, IN_PART, NOT)

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results and of the page.", required=True)
_ONLY = flags.DEFINE_list("only", [], f"Some of {', '.join(EXPERIMENTS)}; all by default.")


def run(name: str, directory: Path, overrides: list[str], title: str) -> dict:
    """What an experiment left in its directory, or the line with which it failed. A finished one is not run again."""
    if (found := finished(name, directory)) is not None:
        print(f"{title}: done already", flush=True)
        return found
    arguments = ["-m", f"experiments.{name}", f"--workdir={directory}", *overrides]
    shown = shlex.join(["python", *arguments])
    print(f"{title}: {shown}", flush=True)
    with (
        subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE) as process,
        terminating(process) as told,
    ):
        tail = b""
        while chunk := os.read(process.stderr.fileno(), 4096):  # its progress, as it comes
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()
            tail = (tail + chunk)[-4096:]
    if told:
        raise UserError(f"terminated during {name}: run again to go on", PREEMPTED)
    if process.returncode:
        lines = re.split("[\r\n]+", tail.decode(errors="replace").strip())
        failure = lines[-1] if process.returncode > 0 and lines[-1] else f"ended with status {process.returncode}"
        return {"name": name, "command": shown, "failure": failure}
    return finished(name, directory)


def finished(name: str, directory: Path) -> dict | None:
    """What the page says of an experiment that has finished, as it is now."""
    path = directory / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    kept = "command", "table", "claims", "certificates", "environment", "seconds"
    return {"name": name} | {key: results[key] for key in kept if key in results}


@contextlib.contextmanager
def terminating(process: subprocess.Popen):
    """As long as it lasts, a SIGTERM goes on to the process; the list that it gives has an element then."""
    told = []

    def pass_on(*_):
        told.append(True)
        process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield told
    finally:
        process.wait()
        signal.signal(signal.SIGTERM, before)


def overrides(argv: list[str]) -> list[str]:
    """Of a command line, what sets the config."""
    found = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        if re.match(r"--?(no)?config([.=]|$)", argument):
            found.append(argument)
            if "=" not in argument and not re.match("--?([a-z]|$)", following):
                found.append(following)
    return found


def page(parts: list[dict], directory: Path) -> tuple[str, str]:
    """The page as HTML, with its figures inside, and as Markdown."""
    import jinja2  # here, so that `main` can say what to install

    for part in parts:
        # Read and not imported: each defines flags of its own.
        source = Path(__file__).with_name(f"{part['name']}.py").read_text()
        part["about"] = ast.get_docstring(ast.parse(source)).splitlines()[0]
        figure = directory / part["name"] / "figures.png"
        if figure.exists():
            part["figure"] = base64.b64encode(figure.read_bytes()).decode()
    claims = [claim | {"experiment": part["name"]} for part in parts for claim in part.get("claims", [])]
    counts = {verdict: sum(claim["verdict"] == verdict for claim in claims) for verdict in VERDICTS}
    environment = next((part["environment"] for part in parts if "environment" in part), {})
    missing = set(EXPERIMENTS) - {part["name"] for part in parts}
    values = {"parts": parts, "claims": claims, "counts": counts, "environment": environment}
    values["certificates"] = study.added(part["certificates"] for part in parts if "certificates" in part)
    values["missing"] = [name for name in EXPERIMENTS if name in missing]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html, markdown = (templates.get_template(f"report.{kind}").render(values) for kind in ("html", "md"))
    return html, markdown


def main() -> None:
    unknown = [name for name in _ONLY.value if name not in EXPERIMENTS]
    if unknown:
        raise UserError(f"--only={unknown[0]}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    command.require("report", "jinja2")
    given = overrides(sys.argv[1:])
    directory = command.open_workdir(_WORKDIR.value, {"config": _CONFIG.value.to_dict()})
    names = [name for name in EXPERIMENTS if not _ONLY.value or name in _ONLY.value]
    parts = {name: part for name in EXPERIMENTS if (part := finished(name, directory / name))}
    for number, name in enumerate(names, 1):
        more = []
        if name == "regularization_test" and "randomization_test" in parts:  # the same six runs
            more = [f"--study={directory / 'randomization_test'}"]
        title = f"experiment {number} of {len(names)}, {name}"
        parts[name] = run(name, directory / name, [*given, *more], title)
        html, markdown = page([parts[name] for name in EXPERIMENTS if name in parts], directory)
        command.write_text(directory / "report.html", html)
        command.write_text(directory / "report.md", markdown)
    for part in parts.values():
        for claim in part.get("claims", []):
            print(f"{claim['verdict']:<20}{part['name']:<22}{claim['paper']}")
    failed = [name for name, part in parts.items() if "failure" in part]
    print(f"{directory / 'report.html'}, {directory / 'report.md'}")
    if failed:
        raise UserError(f"{', '.join(failed)} failed, as the page says; run again to go on")


if __name__ == "__main__":
    command.run(main)
