"""Write one more format from a finished artifact, without tuning, and prove it:
`python examples/another_format.py OUT/artifact FOLDER [--to onnx --set accuracy_level=0]`."""

import argparse
from pathlib import Path

import signround

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("artifact", type=Path)
parser.add_argument("folder", type=Path)
parser.add_argument("--to", default="gptq")
parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
args = parser.parse_args()

options = dict(setting.split("=", 1) for setting in args.set)
exported = signround.export(args.artifact, args.to, args.folder, options=options)
parity = signround.verify(exported.target, args.artifact)
print(f"{exported.target}: {parity.weights.exact} of {parity.weights.tensors} tensors exact")
if parity.logits is not None:
    print(f"{parity.logits.runtime}: mean KL {parity.logits.score.mean_kl:.1e}, gate {parity.logits.gate}")
raise SystemExit(0 if parity.passed else 1)
