"""What preprocessing reads from plans and dataset.json: cases made with other settings must not be mixed."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

# normalisations of nnU-Net that do not read the dataset's intensity statistics
WITHOUT_STATISTICS = {
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
}


def preprocessing_settings(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], dataset_json: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything in these files that changes a preprocessed case.

    The patch size is left out: it decides how blosc2 divides a file, but not what is in it. Plans with other patches
    therefore share their cases.

    Args:
        plans: content of a plans file.
        configuration: the resolved configuration in it.
        dataset_json: content of dataset.json.
    """
    schemes = configuration["normalization_schemes"]
    statistics = plans["foreground_intensity_properties_per_channel"]
    return {
        "preprocessor": configuration["preprocessor_name"],
        "reader": plans["image_reader_writer"],
        "transposition": plans["transpose_forward"],
        "spacing": configuration["spacing"],
        "normalisation": schemes,
        "normalisation inside the mask": configuration["use_mask_for_norm"],
        "intensity statistics": {
            str(channel): statistics[str(channel)]
            for channel, scheme in enumerate(schemes)
            if scheme not in WITHOUT_STATISTICS
        },
        "resampling of images": [configuration["resampling_fn_data"], configuration["resampling_fn_data_kwargs"]],
        "resampling of labels": [configuration["resampling_fn_seg"], configuration["resampling_fn_seg_kwargs"]],
        "labels": dataset_json["labels"],
    }


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A short name of settings, equal on every machine."""
    return blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, with both values where these are short."""
    found = []
    for name in now:
        old, new = (json.dumps(settings.get(name), sort_keys=True) for settings in (before, now))
        if old != new:
            found.append(f"{name} ({old} before, {new} now)" if len(old) + len(new) < 120 else name)
    return found
