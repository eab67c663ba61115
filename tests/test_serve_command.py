"""The command that serves: what it refuses, in one line, and how it ends."""

import signal
import socket

import helpers
import pytest

pytest.importorskip("starlette", reason="pip install -e .[serve]")
httpx = pytest.importorskip("httpx", reason="pip install -e .[test]")


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A memory of the backbone that ships, without a fact."""
    from lamini_jax import api
    from lamini_jax.config import facts

    directory = tmp_path_factory.mktemp("memory") / "memory"
    api.open_memory(directory, facts())
    return directory


def refused(*arguments):
    result = helpers.call("serve", *arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stdout == ""
    return result.stderr


def test_what_is_refused(memory, tmp_path, monkeypatch):
    monkeypatch.delenv("LAMINI_API_KEY", raising=False)
    directory = f"--workdir={memory}"
    assert "give either --workdir=DIR or --memory=DIR" in refused()
    assert "--host=0.0.0.0: others reach it there; set the environment variable LAMINI_API_KEY" in refused(
        directory, "--host=0.0.0.0"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}: cannot listen there (Address already in use)" in refused(directory, f"--port={port}")
    assert "has no finished checkpoint" in refused(f"--workdir={tmp_path}")


def test_it_finishes_what_runs(memory):
    process = helpers.start("serve", f"--workdir={memory}", "--port=0", "--slots=1")
    try:
        line = ""
        while "ready at" not in line:
            line = process.stdout.readline()
            assert line
        address = line.split()[-1]
        request = {"model": "base", "prompt": "Who?", "max_tokens": 200, "temperature": 2.0, "stream": True}
        with httpx.stream("POST", f"{address}v1/completions", json=request, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [each for each in lines if each][-1] == "data: [DONE]"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
