"""What planners are asked about: a stage, and what of its region counts beside that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sepc.ir.convolution import Mixing
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Interleaved
from sepc.ir.stage import Chain, Stage


@dataclass(frozen=True)
class Work:
    """The work of a region, or of a link of a chain.

    Attributes:
        stage: the problem.
        epilogue_cost: vector instructions per vector of results that follow the stage.
        operand_bytes: bytes of the tensors that these read.
        mixing: which fast algorithms may be used, by what they mix.
        packed: whether the weights, if there are any, are constants, which can lie as a kernel reads them.
    """

    stage: Stage | Interleaved | GroupNormalization
    epilogue_cost: int = 0
    operand_bytes: int = 0
    mixing: Mixing = "pixels"
    packed: bool = True

    @property
    def link(self) -> Stage:
        """The stage, as a link of a chain; raises ValueError if it can be none."""
        if isinstance(self.stage, Interleaved | GroupNormalization):
            raise ValueError(f"{self.stage} is no link of a chain")
        return self.stage


def chain_of_work(links: Sequence[Work]) -> Chain:
    """The stages of `links` as a chain."""
    return Chain(tuple(link.link for link in links))
