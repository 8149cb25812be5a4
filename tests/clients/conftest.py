"""The JavaScript clients, and an export of the bundled model for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.clients.workplace import Clients, install


@pytest.fixture(scope="session")
def clients() -> Clients:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node and npm are not installed; on Debian: apt-get install nodejs npm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return install(cache / "vlmexport-clients")
