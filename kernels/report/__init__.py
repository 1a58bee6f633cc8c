"""What the compiler makes of every Triton kernel for GPUs that are not here: `python -m kernels.report --help`.

targets.py      the architectures: limits of a processor, peaks of a device, their sources
cases.py        the launches to compile: what each operator's `report_cases` plans
compiled.py     one launch compiled for one target, and what its code says
occupancy.py    how many blocks fit on a processor, and what limits them
rows.py         a launch, its code, and its roofline
check.py        facts that must hold
table.py        the rows as Markdown and JSON
recorder.py     the launches another library would make, without running any
peers.py        flash-linear-attention's kernels, compiled like ours
comparison.py   the page that sets the two side by side
"""
