"""What threads share, one at a time."""

from __future__ import annotations

from threading import RLock

# Held by whoever uses what belongs to the whole process: torch's random numbers, filters of warnings, levels of
# loggers. A thread that holds it may take it again.
ONE_AT_A_TIME = RLock()
