"""State machines are tables, and the tables are sound."""

from enum import Enum
from typing import Any

import pytest
from tests.tidy.generated import state_tables
from tests.tidy.sources import modules

TABLES = sorted(state_tables().items())
Table = tuple[type[Enum], Any]


def test_every_table_of_the_product_is_looked_at() -> None:
    named = [module.name for module in modules() if "TRANSITIONS: Mapping" in module.text]
    assert len(named) == len(TABLES), "add it to state_tables() in tests/tidy/generated.py"


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_a_table_has_a_row_for_each_state_and_names_no_other(name: str, table: Table) -> None:
    kind, transitions = table
    assert set(transitions) == set(kind), name
    assert {after for row in transitions.values() for after in row} <= set(kind), name


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_every_state_can_be_reached_from_the_first_and_can_end(name: str, table: Table) -> None:
    kind, transitions = table
    assert reachable(next(iter(kind)), transitions) == set(kind), name
    ends = {state for state in kind if not transitions[state]}
    assert ends, name
    assert all(reachable(state, transitions) & ends for state in kind), name


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_no_state_follows_itself(name: str, table: Table) -> None:
    kind, transitions = table
    assert all(state not in transitions[state] for state in kind), name


def reachable(first: Any, transitions: Any) -> set[Any]:
    seen, left = set(), [first]
    while left:
        state = left.pop()
        if state not in seen:
            seen.add(state)
            left += transitions[state]
    return seen
