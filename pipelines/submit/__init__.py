"""`bmojo submit`: a pipeline as a job of a Ray cluster, which needs no terminal here."""
