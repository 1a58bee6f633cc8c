"""Compile every Triton kernel for GPUs that are not here and report the code: `python -m benchmarks.kernel_report -h`.

targets.py      the architectures: limits of a processor, peaks of a device, their sources
cases.py        the launches to compile: every operator's `report_cases`
compiled.py     one launch compiled for one target, and the resources of its code
occupancy.py    how many blocks fit on a processor, and what limits them
rows.py         a launch, its code, and its roofline
check.py        facts that must hold
table.py        the rows as Markdown and JSON
recorder.py     the launches another library would make, without running any
peers.py        flash-linear-attention's kernels, compiled like ours
comparison.py   the page that sets the two side by side
"""
