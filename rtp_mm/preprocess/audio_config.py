"""What a checkpoint says of sounds: `preprocessor_config.json`, or `feature_extractor` in `processor_config.json`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtp_mm.errors import StartError
from rtp_mm.preprocess.image_config import positive, read_rules
from rtp_mm.preprocess.log_mel import MelRule

_log = logging.getLogger(__name__)


def mel_rule(folder: Path, defaults: MelRule) -> MelRule:
    """Reads the checkpoint's file; `defaults`, the family's published values, stand in for what it leaves out.

    `processor_config.json` goes before `preprocessor_config.json`, as in transformers 5. Raises `StartError` that names
    the file and the key for what is malformed or asks for what we do not do.
    """
    for name, key in (("processor_config.json", "feature_extractor"), ("preprocessor_config.json", None)):
        path = folder / name
        if path.is_file():
            file = read_rules(path)
            rules = file if key is None else file.get(key)
            if rules is not None:
                return _from_json(rules, defaults, str(path))
    _log.warning("%s has no preprocessor_config.json: the family's published values are used", folder)
    return defaults


def _from_json(rules: Any, defaults: MelRule, source: str) -> MelRule:
    if not isinstance(rules, Mapping):
        raise StartError(f"{source}: the feature extractor must be an object")
    for name, only in (("padding_value", 0), ("dither", 0), ("do_normalize", False), ("padding_side", "right")):
        if rules.get(name) not in (None, only):
            raise StartError(f"{source}: {name}={rules[name]!r} is not supported, only {only!r}")
    rule = MelRule(
        bins=positive(rules, "feature_size", defaults.bins, source),
        rate=positive(rules, "sampling_rate", defaults.rate, source),
        hop=positive(rules, "hop_length", defaults.hop, source),
        window=positive(rules, "n_fft", defaults.window, source),
        seconds=positive(rules, "chunk_length", defaults.seconds, source),
    )
    if rule.rate != 2 * MelRule.MAX_HERTZ:
        raise StartError(f"{source}: sampling_rate={rule.rate} is not supported, only {2 * MelRule.MAX_HERTZ}")
    return rule
