"""What the tests of reports share: an explanation of a model of which each computes a part."""

from __future__ import annotations

import pytest
import torch

import sepc
from sepc.passes import fuse
from tests.report.mixed import Mixed, X


@pytest.fixture(scope="session")
def explanation() -> sepc.Explanation:
    """Of `Mixed`, nothing being fused as that never gains."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "piece_time_us", lambda links, *_: float(len(links) ** 2))
        found = sepc.explain(Mixed().eval(), X, target="x86-64-v3", num_threads=1)
        assert len(found.graphs) > 1  # The passes run for these, and have to do the same again.
        return found
