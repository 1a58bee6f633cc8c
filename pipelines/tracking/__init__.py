"""Journal-first tracking: what happens is written to local files at once and replayed to MLflow in the background."""
