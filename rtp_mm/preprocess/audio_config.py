"""What a checkpoint says of sounds: `preprocessor_config.json`, or `feature_extractor` in `processor_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtp_mm.errors import StartError
from rtp_mm.preprocess.log_mel import MelRule
from rtp_mm.preprocess.processor_files import ProcessorFiles, find_rules, positive

AUDIO_FILES: ProcessorFiles = (("processor_config.json", "feature_extractor"), ("preprocessor_config.json", None))


def mel_rule(folder: Path, defaults: MelRule) -> MelRule:
    """Reads the checkpoint's file; `defaults`, the family's published values, stand in for what it leaves out.

    Raises `StartError` that names the file and the key for what is malformed or asks for what we do not do.
    """
    found = find_rules(folder, AUDIO_FILES)
    return defaults if found is None else _from_json(found[0], defaults, found[1])


def _from_json(rules: Mapping[str, Any], defaults: MelRule, source: str) -> MelRule:
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
