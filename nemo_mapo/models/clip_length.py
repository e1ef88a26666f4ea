"""The error for a clip that is too short for an encoder."""


def too_short(num_samples: int, needed: int, sample_rate: int) -> ValueError:
    """The error for a clip with fewer than `needed` samples; `sample_rate` is in Hz."""
    return ValueError(
        f"a clip of {num_samples} samples is shorter than the {needed} ({needed / sample_rate:g} s) that the encoder "
        f"needs; set min_duration={needed / sample_rate:g} for the split, or remove the clip"
    )
