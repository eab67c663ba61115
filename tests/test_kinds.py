"""How much bad input is tried, by kinds: `pytest tests/test_kinds.py -s` prints the table."""

import importlib

import kinds

MODULES = """
    test_checkpoint_faults test_cli test_export test_fact_input test_fact_memory test_facts test_faults test_processes
    test_wrong_input
""".split()


def test_kinds_of_bad_input():
    for name in MODULES:
        importlib.import_module(name)
    print("\n" + kinds.markdown())
    for kind, names in kinds.TABLE.items():
        assert names and len(names) == len(set(names)), kind
    assert len(kinds.TABLE) >= 30 and sum(map(len, kinds.TABLE.values())) >= 150
