"""From a URL to pixels: fetch (`fetch.py`), tell what came (`sniff.py`), decode (`image.py`). Imports no torch."""
