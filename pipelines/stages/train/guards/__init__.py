"""What watches a training and acts when it goes wrong (docs/design/0026)."""
