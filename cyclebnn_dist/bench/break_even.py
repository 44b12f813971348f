"""The break-even bandwidth: up to which rate of the network a narrow all-reduce is the faster one.

An all-reduce has a wire's time, which shrinks with the rate, and a codec's, which does not. How far the two hide each
other is taken from what was measured on one network and held for all others.
"""

from __future__ import annotations

from dataclasses import dataclass

from cyclebnn_dist.comm.breakeven import breakeven_bytes_per_second


@dataclass(frozen=True)
class Cost:
    """What an all-reduce takes at any rate of the network.

    Attributes:
        sent_bytes: of a rank.
        codec_seconds: encoding and decoding, all ranks at once.
        slack: how many times as long as its bytes take the wire is busy; 1 where the two overlap.
        overlap: how much of the shorter one the longer one hides, 0 to 1.
    """

    sent_bytes: float
    codec_seconds: float
    slack: float
    overlap: float

    def seconds(self, rate: float) -> float:
        """At ``rate`` bytes a second."""
        wire = self.slack * self.sent_bytes / rate
        return wire + self.codec_seconds - self.overlap * min(wire, self.codec_seconds)


def fit_cost(*, seconds: float, sent_bytes: float, codec_seconds: float, rate: float) -> Cost:
    """The cost that explains ``seconds`` measured at ``rate``."""
    wire = sent_bytes / rate
    if codec_seconds == 0.0 or seconds >= wire + codec_seconds:
        return Cost(sent_bytes, codec_seconds, slack=(seconds - codec_seconds) / wire, overlap=0.0)
    hidden = (wire + codec_seconds - seconds) / min(wire, codec_seconds)
    return Cost(sent_bytes, codec_seconds, slack=1.0, overlap=min(1.0, hidden))


def break_even(cost: Cost, baseline: Cost) -> float | None:
    """The rate (bytes a second) at which both take as long, as ``breakeven_bytes_per_second`` gives it."""
    return breakeven_bytes_per_second(cost.seconds, baseline.seconds)
