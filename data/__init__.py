"""From text to token streams: sources, tokenizer, packing into MDS shards, streaming. Knows neither Ray nor MLflow."""
