"""Fixtures for the model tests."""

import pytest

from tests.models import golden as files


@pytest.fixture(params=files.NAMES)
def golden(request) -> files.Golden:
    """One tiny transformers model of each family and head layout: see golden.py."""
    return files.read(request.param)
