"""Makes the bare checkout importable where it is not installed; keeps tests out of the user's cache."""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if "quantitron" not in sys.modules:
    package = types.ModuleType("quantitron")
    package.__path__ = [str(ROOT)]
    sys.modules["quantitron"] = package


WORKER = "PYTEST_XDIST_WORKER"
if WORKER in os.environ:
    # As many processes as cores: each, and what it starts, computes with one thread. Set before torch starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _dictionaries_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither fill the user's cache of fingerprint dictionaries nor take anything from it."""
    folder = tmp_path_factory.getbasetemp()
    if WORKER in os.environ:
        folder = folder.parent  # all processes of the run fill one cache
    cache = folder / "dictionaries"
    cache.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTITRON_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small arrays are computed faster by one thread than shared out to several."""
    import torch  # here, because the command's own start is to be seen without it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
