"""What the JavaScript example needs."""

import pytest

from tests.javascript.support import install


@pytest.fixture(scope="session", autouse=True)
def packages():
    """Installed once; a machine that cannot install them fails here, and says why."""
    install()
