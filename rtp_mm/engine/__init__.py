"""From items of a request to embeddings: fetch, preprocess and forward, each in its own lane."""
