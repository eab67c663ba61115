"""A run's directory keeps to one configuration, and its files are never half-written."""

import json
from pathlib import Path

import pytest

from lamini_jax.errors import OTHER_RUN, UserError
from lamini_jax.runtime import workdir


def test_write_json_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "results.json"
    workdir.write_json(path, {"share": 0.5})
    assert path.read_text() == '{\n "share": 0.5\n}\n'
    with pytest.raises(ValueError):
        workdir.write_json(path, {"share": float("nan")})
    assert json.loads(path.read_text()) == {"share": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_open_workdir_keeps_to_one_identity(tmp_path):
    path = str(tmp_path / "runs" / "one")
    identity = {"config": {"seed": 0, "memory": {"num_experts": 64}}, "facts": "a1", "mesh": (1, 2)}
    assert workdir.open_workdir(path, identity) == Path(path)
    assert workdir.open_workdir(path, identity) == Path(path)

    saved = (Path(path) / "config.json").read_bytes()
    other = {**identity, "config": {"seed": 0, "memory": {"num_experts": 65}}, "extra": True}
    with pytest.raises(UserError) as caught:
        workdir.open_workdir(path, other)
    assert "config.memory.num_experts: 64 -> 65, extra: (absent) -> true;" in str(caught.value)
    assert "--workdir" in str(caught.value) and "seed" not in str(caught.value)
    assert caught.value.status == OTHER_RUN
    assert (Path(path) / "config.json").read_bytes() == saved


def test_open_workdir_refuses_what_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for path in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below"), str(tmp_path / "broken")):
        with pytest.raises(UserError, match="--workdir"):
            workdir.open_workdir(path, {})
