"""MLflow as a sink: where its store is, what goes there, and what its errors mean."""
