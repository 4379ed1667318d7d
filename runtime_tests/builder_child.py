"""A process that runs the onnxruntime-genai builder on GPTQ folders, one after the other, and says how each went.

It reads one JSON object a line, {"folder", "out", "options"}, and answers with one, {"error"}: "" or what was raised.
Unlike `signround.runtimes.gptq_builder_worker` it outlives the failures that the tests want to see (any other ends it,
with its traceback), and leaves every option to the caller. Imports take some 8 s, a small model a tenth of a second.
"""

from __future__ import annotations

import json
import os
import sys
import warnings


def main() -> None:
    warnings.filterwarnings("ignore")
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the builder prints
        from onnxruntime_genai.models import builder

        for line in sys.stdin:
            case = json.loads(line)
            place = ("", case["folder"], case["out"], "int4", "cpu", f"{case['out']}-cache")
            error = ""
            try:
                builder.create_model(*place, **builder.parse_extra_options(*place, case["options"]))
            except (AttributeError, KeyError, NotImplementedError) as raised:  # what the tests expect of it
                error = f"{type(raised).__name__}: {raised}"
            replies.write(json.dumps({"error": error}) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
