"""How many tokens a serving step may hold: enough to be fast, few enough that nobody waits."""

from __future__ import annotations


class TokenBudget:
    """Closed-loop token budget for steps that mix decoding with prefill.

    A step of n tokens is modelled as `a + b n` seconds, learned with forgetting. While requests decode, a step
    may take at most `slowdown` times a pure decode step, so the budget is the largest n the model allows;
    what the model misses (attention over long prompts, a noisy machine) is corrected by additive increase and
    multiplicative decrease on the observed overshoot (as 2503.05248 does for batch sizes). Chunked prefill
    under such a budget is Sarathi-Serve's (2403.02310), which fixes the number offline.
    """

    FORGETTING = 0.9  # half of the weight in the last 7 steps: load changes within seconds
    SMALLEST = 16  # tokens of prefill that always make progress
    INCREASE, DECREASE = 0.05, 0.7

    def __init__(self, slowdown: float, largest: int) -> None:
        if slowdown <= 1.0:
            raise ValueError(f"slowdown must be above 1, got {slowdown}")
        if largest < self.SMALLEST:
            raise ValueError(f"the largest budget must be at least {self.SMALLEST} tokens, got {largest}")
        self.slowdown = slowdown
        self.largest = largest
        self.correction = 1.0
        self._sums = [0.0] * 5  # weight, n, t, n*n, n*t
        self._allowed: float | None = None

    def tokens(self, decoding: int) -> int:
        """Budget of the next step when `decoding` requests each need one token of it."""
        self._allowed = None
        coefficients = self.cost()
        if decoding == 0 or coefficients is None:
            return self.largest
        fixed, slope = coefficients
        decode_step = fixed + slope * decoding
        self._allowed = self.slowdown * decode_step
        room = (self._allowed - decode_step) / slope if slope > 0 else float(self.largest)
        return min(self.largest, decoding + max(self.SMALLEST, int(room * self.correction)))

    def cost(self) -> tuple[float, float] | None:
        """Seconds of an empty step and seconds per token, or None before two sizes were seen."""
        weight, x, y, xx, xy = self._sums
        spread = weight * xx - x * x
        if weight == 0.0 or spread <= 1e-6 * weight * xx:
            return None
        slope = max(0.0, (weight * xy - x * y) / spread)
        return max(0.0, (y - slope * x) / weight), slope

    def observe(self, tokens: int, seconds: float) -> None:
        """One finished step: how many tokens it held and how long it took."""
        sample = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [old * self.FORGETTING + new for old, new in zip(self._sums, sample, strict=True)]
        if self._allowed is None:
            return
        if seconds > self._allowed:
            self.correction = max(0.05, self.correction * self.DECREASE)
        else:
            self.correction = min(1.0, self.correction + self.INCREASE)
