"""One thread: the models of the tests are so small that threads would only wait for each other."""

import atexit
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two processes that compile at once have been seen to read each other's half-written libraries, and a killed one leaves
# such a file for good. A worker of xdist inherits the folder of the process that started it.
if "PYTEST_XDIST_WORKER" in os.environ or "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="minisft-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

settings.register_profile("any load", deadline=None)
settings.load_profile("any load")


def pytest_configure(config):
    if config.option.markexpr != "gpu":  # all other tests are about the CPU, also where there is a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The base model of small runs; nobody writes into its folder."""
    from oracles.tiny_llama import write_tiny_llama  # after the settings above, which libraries read when they load

    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))
