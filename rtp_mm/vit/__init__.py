"""Towers: packed uint8 patch rows in, merged embeddings out. Ours from patch embedding to merger, no Hugging Face."""
