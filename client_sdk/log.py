"""The client's logger: what becomes of connections, episodes and policies. Any thread."""

from __future__ import annotations

import logging

logger = logging.getLogger("client_sdk")
