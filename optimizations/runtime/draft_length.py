"""How many tokens to draft: acceptance and verification cost, both learned while generating."""

from __future__ import annotations


class DraftLength:
    """Chooses the draft length that maximises expected tokens per second.

    Verification of a draft of L tokens is modelled as `a + b L` seconds (least squares with forgetting);
    each drafted token is accepted with probability p given that the earlier ones were, so a draft yields
    1 + p + ... + p^L tokens (Leviathan et al., 2211.17192, eq. 1, with the cost of this machine in place of
    the paper's ratio). With p too low for the cost it drafts nothing, and probes again now and then.
    """

    FORGETTING = 0.95  # half of the weight lies in the last 14 steps
    PROBE_EVERY = 16
    # Before anything is timed: one more token in a memory-bound forward costs about a tenth of a step on
    # two cores with int8 dot products. Replaced by the first measurements.
    PRIOR_SLOPE = 0.1

    def __init__(self, longest: int) -> None:
        if longest < 1:
            raise ValueError(f"the longest draft must be at least 1 token, got {longest}")
        self.longest = longest
        self.accepted = 2.0  # prior: two of three drafted tokens accepted, worth three observations
        self.rejected = 1.0
        self._sums = [0.0] * 5  # weight, L, t, L*L, L*t
        self._steps_without = 0

    def choose(self) -> int:
        """Length of the next draft, 0 to `longest`."""
        best = max(range(self.longest + 1), key=self.tokens_per_second)
        if best == 0:
            self._steps_without += 1
            if self._steps_without % self.PROBE_EVERY == 0:
                return min(2, self.longest)
        return best

    def tokens_per_second(self, length: int) -> float:
        """Expected rate of a step that drafts `length` tokens (in 1/s, or per step before any timing)."""
        fixed, slope = self.cost()
        probability = self.accepted / (self.accepted + self.rejected)
        expected = sum(probability**i for i in range(length + 1))
        return expected / (fixed + slope * length)

    def cost(self) -> tuple[float, float]:
        """Seconds of a step without a draft, and seconds per drafted token."""
        weight, x, y, xx, xy = self._sums
        if weight == 0.0:
            return 1.0, self.PRIOR_SLOPE
        spread = weight * xx - x * x
        if spread <= 1e-6 * max(1.0, weight * xx):  # one length seen so far
            fixed = y / weight / (1.0 + self.PRIOR_SLOPE * x / weight)
            return fixed, fixed * self.PRIOR_SLOPE
        slope = max(0.0, (weight * xy - x * y) / spread)
        return max(1e-9, (y - slope * x) / weight), slope

    def observe(self, length: int, matched: int, seconds: float | None) -> None:
        """One verified draft: its length, how many of its tokens were accepted, and its time if it counts."""
        if length:
            self.accepted = self.accepted * self.FORGETTING + matched
            self.rejected = self.rejected * self.FORGETTING + (matched < length)
        if seconds is not None:
            sample = (1.0, length, seconds, length * length, length * seconds)
            self._sums = [old * self.FORGETTING + new for old, new in zip(self._sums, sample, strict=True)]
