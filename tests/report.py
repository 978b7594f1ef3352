"""How a program that drives an engine for a test answers it, on a line of its own.

Ray's native libraries write their warnings to standard output, at any time: what the test reads
has to be apart from that.
"""

import json
import os
import sys


def apart():
    """A function that writes a value as a line of JSON to what was standard output; whatever else
    is written there goes to standard error from now on."""
    ours = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return lambda value: print(json.dumps(value), file=ours, flush=True)
