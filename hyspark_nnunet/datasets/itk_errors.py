"""ITK's error texts in a line, with the way out where there is one."""

NOT_ORTHONORMAL = "orthonormal"


def reason(error: BaseException) -> str:
    """The informative line of ITK's many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    if NOT_ORTHONORMAL in text.lower():
        return (
            f"{text} Its axes are not perpendicular (a shear). If the qform of a NIfTI file is right, keep that alone, "
            "with nibabel: image.set_sform(None, code=0); otherwise resample it, with nibabel.processing."
            "resample_to_output(image)"
        )
    if "Unable to determine ImageIO reader" in text:
        return "its content is damaged or not what its ending says, or the ending is not lower-case: copy or rename it"
    return text
