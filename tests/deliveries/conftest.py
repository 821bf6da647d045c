"""Certificates for servers of these tests."""

from __future__ import annotations

import pytest

from tests.deliveries import certificates
from tests.deliveries.certificates import Certificates


@pytest.fixture(scope="session")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority of our own, and certificates by it."""
    return certificates.make(tmp_path_factory.mktemp("certificates"))
