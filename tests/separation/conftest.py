"""Fits of small matrices are quickest with one thread."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_deterministic: None) -> None:
    torch.set_num_threads(1)
