"""What updates the weights: each backend is a config (config.py) and a Trainer, in a module of its own."""
