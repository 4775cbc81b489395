"""The error of media that do not fit together."""


class MediaError(ValueError):
    """A processor's output, or what ``pad_input_ids`` made of it, contradicts itself."""
