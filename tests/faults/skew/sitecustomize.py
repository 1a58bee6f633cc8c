"""First on the PYTHONPATH of a command whose clock is to be wrong: moves time.time, and names another machine.

Leases judge a process of the same machine by its number, so a wrong clock only counts for owners of other machines.
"""

import os
import socket
import time

_OFFSET_S = float(os.environ.get("FAULTS_CLOCK_S") or 0)
_HOST = os.environ.get("FAULTS_HOST", "")

if _OFFSET_S:
    _true_time, _true_time_ns = time.time, time.time_ns
    time.time = lambda: _true_time() + _OFFSET_S
    time.time_ns = lambda: _true_time_ns() + int(_OFFSET_S * 1e9)
if _HOST:
    socket.gethostname = lambda: _HOST
