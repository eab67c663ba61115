"""What the READMEs point to is there."""

import re

import pytest
from helpers import ROOT

READMES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md")))
LINK, HEADING = re.compile(r"\]\(([^)\s]+)\)"), re.compile("^#+ (.*)$", re.MULTILINE)


def anchor(heading):
    """The name that a page gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_links_lead_somewhere(readme):
    """To a file of the project and, if they name one, a heading in it."""
    path, broken = ROOT / readme, []
    for link in LINK.findall(path.read_text()):
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        if "://" in link or (target.exists() and not heading):
            continue
        if not target.is_file() or heading not in map(anchor, HEADING.findall(target.read_text())):
            broken.append(link)
    assert not broken


def test_the_readmes_are_found():
    assert {"README.md", "experiments/README.md", "lamini_jax/README.md", "launch/README.md"} <= set(map(str, READMES))
