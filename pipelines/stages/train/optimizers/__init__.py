"""What updates the weights: which parameters are updated together and how, apart from how a backend shards them."""
