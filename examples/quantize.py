"""Tune the bundled model and write files for two runtimes: `python examples/quantize.py OUT [--iters 20] ...`.

Started again with the same arguments it continues, or says that it is done.
"""

import argparse
from pathlib import Path

import signround

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("--model", type=Path, default=Path(__file__).parent / "llama-4m")
parser.add_argument("--scheme", default="w4g32")
parser.add_argument("--to", action="append", help="gguf, onnx or gptq; default: gguf and onnx")
parser.add_argument("--iters", type=int, default=20)
parser.add_argument("--samples", type=int, default=32)
parser.add_argument("--seqlen", type=int, default=128)
args = parser.parse_args()

report = signround.quantize(
    args.model, args.scheme, args.out, args.to or ["gguf", "onnx"],
    iters=args.iters, samples=args.samples, seqlen=args.seqlen, on_event=print,
)  # fmt: skip
print({name: round(report["perplexity"][name], 3) for name in ("float", "rounded", "tuned")})
for name, export in report["exports"].items():
    print(f"{name}: {export['target']}, {'passed' if export['passed'] else 'FAILED'}")
