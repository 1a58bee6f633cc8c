"""What a kill in the middle of three small stages costs, here and in Metaflow."""
