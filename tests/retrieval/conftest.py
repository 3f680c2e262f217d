"""What the tests of Milvus share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an embedded engine that the tests of a file share; each names its own collection."""
    return f"milvus://{tmp_path_factory.mktemp('milvus')}/store.db"


@pytest.fixture
def url(database: str, request: pytest.FixtureRequest) -> str:
    return f"{database}?collection={request.node.name.partition('[')[0]}"
