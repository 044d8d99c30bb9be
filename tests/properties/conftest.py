"""Few examples and no deadline, so that all properties take seconds; the same examples every time in CI."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kdrl",
    max_examples=30,
    deadline=None,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kdrl")
