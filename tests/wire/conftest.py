"""Property tests that find the same examples on every machine, however loaded it is."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")
