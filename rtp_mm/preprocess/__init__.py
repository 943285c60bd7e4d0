"""From pixels to patch rows: sizes (`sizes.py`), the checkpoint's rules (`image_config.py`), rows (`patches.py`).

Imports no torch: preprocess workers read this.
"""
