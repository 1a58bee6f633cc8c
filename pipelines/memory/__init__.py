"""Long-term memory in storage: documents as a model remembers them, and answers that read them inside decoding.

model, tokenizer, identity = load_exported(Path("exports/model"))
store = DocumentStore.create(open_storage("s3://bucket/notes"), identity)
remember_files(store, model, tokenizer, files_of([Path("notes")]))
memory = StoredMemory(store, model, identity)
answer = ask(model, tokenizer, memory, "The key is", Drawing(100))
print("".join(answer.pieces()), answer.sources())
"""
