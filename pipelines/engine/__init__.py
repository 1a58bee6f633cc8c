"""The durable layer under a pipeline: storage, fingerprints, records, leases, run state, plan and runner (DESIGN 5)."""
