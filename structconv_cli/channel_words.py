"""Channel numbers as people write them in plan files: "0-3,7"."""

import re

_MOST_CHANNELS = 2**20


def channel_numbers(value: object) -> object:
    """Channel numbers from words such as "0-3,7"; anything else as it is.

    Raises:
        ValueError: the words are no channel numbers.
    """
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for word in value.split(",") if value else ():
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if match is None:
            raise ValueError(f'channels are written as "0-3,7"; found "{word}"')
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if not 0 <= last - first < _MOST_CHANNELS:
            raise ValueError(
                f'"{word}" must rise from its first channel to its last, by less than '
                f"{_MOST_CHANNELS}"
            )
        found += range(first, last + 1)
    return tuple(found)


def channel_words(channels: tuple[int, ...]) -> str:
    """Channel numbers in few words, as in "0-3,7"; for files that people read."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][1] + 1:
            runs[-1][1] = channel
        else:
            runs.append([channel, channel])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
