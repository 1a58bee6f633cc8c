"""All faults, by name."""

from tests.faults.kinds import clocks, disks, processes, rot, servers
from tests.faults.kinds.fault import Fault

FAULTS: dict[str, Fault] = {
    fault.name: fault for fault in (*processes.FAULTS, *servers.FAULTS, *disks.FAULTS, *rot.FAULTS, *clocks.FAULTS)
}
