"""How experiments print what they measure."""

import json
from collections.abc import Iterable


def print_lines(lines: Iterable[dict]) -> None:
    """Prints each line as JSON as soon as it is measured, with five digits after the point."""
    for line in lines:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}
        print(json.dumps(rounded), flush=True)
