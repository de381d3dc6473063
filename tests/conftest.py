"""Shared fixtures, and the reasons why marked tests are skipped."""

import os

import pytest
import torch

from tests.tiny import tiny_model

# Tiny tensors: a second thread costs more than it gives, and much more on a busy machine. So it is in the programs that
# tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU, and PyTorch sees none here",
        "hub": None if os.environ.get("IBKIT_TEST_HUB") else "needs the network: set IBKIT_TEST_HUB=1 to run it",
        "slow": None if os.environ.get("IBKIT_TEST_SLOW") else "takes minutes: set IBKIT_TEST_SLOW=1 to run it",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from ibkit.pocket.build.tokenizer import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tiny(tokenizer):
    """A fresh tiny model with the same random weights each time."""
    return tiny_model(tokenizer)
