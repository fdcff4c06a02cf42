"""Property tests: how many examples, and how they are drawn.

CI tries a few; `PFCR_MM_EXAMPLES=200 pytest tests/properties -s` tries as many of each
of the slow ones and prints what came of them.
"""
import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get('PFCR_MM_EXAMPLES', 0))


def examples(few):
    """Settings of a slow property: `few` examples unless the environment says more."""
    return settings(max_examples=EXAMPLES or few)


class Drawn:
    """Draws for `mutations`, by hypothesis."""

    def __init__(self, draw):
        self._draw = draw

    def of(self, items):
        """One of them."""
        return self._draw(st.sampled_from(items))

    def number(self, low, high):
        """An integer, both ends included."""
        return self._draw(st.integers(low, high))


settings.register_profile(
    'pfcr_mm', deadline=None, derandomize=True, database=None,
    # nothing is shrunk: an example is a whole run
    phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
settings.load_profile('pfcr_mm')
