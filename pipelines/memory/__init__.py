"""Long-term memory in storage: documents as a model remembers them, and answers that read them inside decoding.

store = DocumentStore.create(open_storage("s3://bucket/notes"), identity)
remember_texts(store, model, tokenizer, texts)
asked = Asked(model, StoredMemory(store, model), [query_ids], begin="fresh")
for tokens_b in asked.draw(Drawing(100)): ...
"""
