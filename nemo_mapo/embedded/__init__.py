"""The embedded demo: a synthetic corpus, its tokenizer, and the start that is taught on it; nothing else knows them."""
