"""How Hypothesis draws in every test of the repository: the same examples on every machine, however slow it is."""

from __future__ import annotations

import os

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

# In a process of pytest-xdist, pytest-benchmark would disable itself, in the inner runs of tests as well. What is measured
# here beside other tests is looked at for being there, never for how long it took.
for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
    os.environ.pop(name, None)
