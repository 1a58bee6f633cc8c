"""The durable layer under a pipeline: storage, fingerprints, records, leases, run state, plan and runner.

Why it is so: docs/design/0002 and 0003.
"""
