"""The embedded demo: a synthetic corpus, its tokenizer and a start policy trained on it; no other room imports it."""
