"""Journal-first tracking: what happens is written to local files at once and replayed to sinks in the background."""
