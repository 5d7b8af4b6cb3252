"""Databases for the contract checks: the real ones."""

import os
from collections.abc import Iterator

import pytest
from tests.postgres import Postgres, PostgresUnavailable


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL. Where there is none the test is skipped, except in CI, where that is a failure."""
    try:
        server = Postgres()
    except PostgresUnavailable as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    try:
        server.start()
        yield server
    finally:
        server.close()
