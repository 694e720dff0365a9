"""How Hypothesis draws in every test of the repository: the same examples on every machine, however slow it is."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadline: 200 ms per example is soon exceeded beside other work. The examples follow from the test alone, not from
# chance or from what an earlier run left in .hypothesis.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
