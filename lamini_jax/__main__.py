"""The console script: `lamini-jax COMMAND ...` is `python -m lamini_jax.COMMAND ...`."""

import runpy
import sys

COMMANDS = {
    "tune": "trains a memory until it returns each of your facts exactly",
    "ask": "answers questions with a tuned memory",
    "forget": "forgets facts of a memory",
    "facts": "lists and searches the facts of a memory",
    "train_scope": "trains what decides whether a question asks for a fact, for another backbone",
    "serve": "serves a memory to clients of the OpenAI API, and a page",
    "export": "writes a memory, an adapter or a backbone for use elsewhere",
}


def main() -> None:
    """Runs the command that the first argument names, with the remaining arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print("usage: lamini-jax COMMAND [--FLAG=VALUE ...]\n")
        print("\n".join(f"  {command:<13}{about}" for command, about in COMMANDS.items()))
        print("\nlamini-jax COMMAND --help lists the flags of a command.")
        return
    if name not in COMMANDS:
        sys.exit(_unknown(name))
    sys.argv = [f"lamini-jax {name}", *sys.argv[2:]]
    runpy.run_module(f"lamini_jax.{name}", run_name="__main__", alter_sys=True)


def _unknown(name: str) -> int:
    print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
