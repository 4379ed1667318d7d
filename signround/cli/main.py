"""The command line: arguments in, exit code out (0 done, 1 the work failed or what was
looked at has problems, 2 the request was refused).

Every command is a thin door to a function of the library with the same names and defaults.
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from signround.errors import FailedError, RefusedError, SignroundError, refuse

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune the rounding of a language model once, ship it to llama.cpp, ONNX Runtime and GPTQ, prove each file.",
)

INTERRUPTED = 130  # what newer versions of typer make of Ctrl-C
# Typer raises these for a command line that cannot be parsed, and has no name of its own for their base class.
_UsageError: Any = typer.BadParameter.__base__

Model = Annotated[Path, typer.Argument(help="A Hugging Face folder: config.json, *.safetensors, tokenizer.")]
Scheme = Annotated[
    str, typer.Option(help="A grid (w4g32, w2g64-asym) or a file type of llama.cpp (q4_k_m); see `signround schemes`.")
]
To = Annotated[list[str] | None, typer.Option("--to", help="A format to write: gguf, onnx or gptq; repeat for more.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="An option of a format, for example onnx.accuracy_level=0.")
]
Method = Annotated[str, typer.Option(help="signround, signround-400 (the paper's first draft) or rtn.")]
Recipe = Annotated[str, typer.Option(help="fast, default or best.")]
Calibration = Annotated[str, typer.Option(help="A text file, hub:NAME, or self: text that the model writes.")]
Samples = Annotated[
    int | None,
    typer.Option(help="Calibration windows; if not given, the recipe's number, fewer if text or memory is short."),
]
Seqlen = Annotated[int | None, typer.Option(help="Tokens a window.")]
Iters = Annotated[int | None, typer.Option(help="Tuning steps a block.")]
BatchSize = Annotated[int | None, typer.Option(help="Windows a step.")]
Seed = Annotated[int, typer.Option(help="Decides samples and steps; the same seed gives the same bytes.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        help="PATTERN=TYPE for matrices whose name matches: lm_head=w8g32, embed_tokens=w4g32, down_proj=float; with a "
        "file type in llama.cpp's words, ffn_down=q6_k. The first that matches wins; repeat for more.",
    ),
]
Imatrix = Annotated[
    Path | None, typer.Option(help="A llama.cpp importance matrix, in place of the one that calibration measures.")
]
SplitMaxSize = Annotated[
    str | None, typer.Option(help="Write the GGUF in parts of at most this size, for example 2G (gguf.split_max_size).")
]
GgufTemplate = Annotated[
    Path | None,
    typer.Option(
        help="A float .gguf of llama.cpp's converter: take its metadata, tokenizer and names (gguf.template)."
    ),
]
Layout = Annotated[
    str | None, typer.Option(help="How the ONNX folder is laid out: genai or transformers.js (onnx.layout).")
]
Text = Annotated[Path | None, typer.Option(help="A text to evaluate on.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, and nothing else there.")]


@app.command()
def quantize(
    model: Model,
    scheme: Scheme,
    out: Out,
    to: To = None,
    method: Method = "signround",
    recipe: Recipe = "default",
    calibration: Calibration = "self",
    samples: Samples = None,
    seqlen: Seqlen = None,
    iters: Iters = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    tensor_type: TensorType = None,
    imatrix: Imatrix = None,
    text: Text = None,
    split_max_size: SplitMaxSize = None,
    gguf_template: GgufTemplate = None,
    layout: Layout = None,
    setting: Setting = None,
    as_json: Json = False,
) -> None:
    """Plan, tune, export, verify, report: the main job. Run again, it continues."""
    from signround import pipeline, report
    from signround.cli.output import print_json, print_report
    from signround.cli.progress import ProgressDisplay

    with ProgressDisplay() as progress:
        result = pipeline.quantize(
            model, scheme, out, to or (), method=method, recipe=recipe, calibration=calibration, samples=samples,
            seqlen=seqlen, iters=iters, batch_size=batch_size, seed=seed, device=device,
            tensor_types=tensor_type or (), imatrix=imatrix, text=text,
            options=_options(setting, split_max_size, gguf_template, layout), on_event=progress,
        )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        print_report(result, str(out))
    if not report.passed(result):
        raise FailedError(
            f"{' and '.join(report.failed(result))} missed a gate; {out / 'report.md'} says which and why."
        )


@app.command()
def plan(
    model: Model,
    scheme: Scheme,
    to: To = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also check that this folder can be written.")] = None,
    method: Method = "signround",
    recipe: Recipe = "default",
    calibration: Calibration = "self",
    samples: Samples = None,
    seqlen: Seqlen = None,
    iters: Iters = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    tensor_type: TensorType = None,
    imatrix: Imatrix = None,
    split_max_size: SplitMaxSize = None,
    gguf_template: GgufTemplate = None,
    layout: Layout = None,
    setting: Setting = None,
    as_json: Json = False,
) -> None:
    """Show what would be done, with sizes, memory, time and every refusal; do nothing."""
    from signround import pipeline
    from signround.cli.output import print_json, print_lines
    from signround.estimate import describe, describe_lines

    job = pipeline.prepare(
        model, scheme, out, to or (), method=method, recipe=recipe, calibration=calibration, samples=samples,
        seqlen=seqlen, iters=iters, batch_size=batch_size, seed=seed, device=device,
        tensor_types=tensor_type or (), imatrix=imatrix,
        options=_options(setting, split_max_size, gguf_template, layout),
    )  # fmt: skip
    description = describe(job)
    if as_json:
        print_json(description)
    else:
        print_lines(describe_lines(description))


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="The artifact/ folder of a finished job.")],
    to: Annotated[str, typer.Option("--to", help="The format to write.")],
    out: Out,
    split_max_size: SplitMaxSize = None,
    gguf_template: GgufTemplate = None,
    layout: Layout = None,
    setting: Setting = None,
    as_json: Json = False,
) -> None:
    """Write another format from a finished artifact, without tuning."""
    from signround import pipeline
    from signround.cli.output import print_json, print_lines
    from signround.cli.progress import ProgressDisplay

    options = _options(setting, split_max_size, gguf_template, layout)
    flags = (
        ("--split-max-size", split_max_size, "gguf"), ("--gguf-template", gguf_template, "gguf"),
        ("--layout", layout, "onnx"),
    )  # fmt: skip
    for flag, value, format in flags:
        if value is not None and to != format:
            raise refuse(f"this is an option of {format}, the format is {to}", "leave it out", flag)
    if any(name != to for name in options):
        raise refuse(f"it names another format than {to}", f"write --set {to}.OPTION=VALUE", "--set")
    with ProgressDisplay() as progress:
        exported = pipeline.export(artifact, to, out, options=options.get(to), on_event=progress)
    if as_json:
        print_json({"format": exported.format, "target": str(exported.target), "files": [*map(str, exported.files)]})
    else:
        print_lines([f"{path} ({path.stat().st_size:,} bytes)" for path in exported.files])


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(help="A .gguf file, an ONNX folder or a GPTQ folder.")],
    artifact: Annotated[Path, typer.Option(help="The artifact/ folder that the file was written from.")],
    as_json: Json = False,
) -> None:
    """Compare a file with its artifact, bit for bit, and run it in its runtime."""
    from signround import pipeline
    from signround.cli.output import print_json, print_lines
    from signround.cli.progress import ProgressDisplay
    from signround.report import parity_json, parity_lines

    with ProgressDisplay() as progress:
        parity = pipeline.verify(target, artifact, on_event=progress)
    if as_json:
        print_json(parity_json(parity))
    else:
        print_lines(parity_lines(parity))
    if not parity.passed:
        raise FailedError(f"{target} is not the tuned model, or its runtime strays too far from it; see above.")


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="A Hugging Face folder, an artifact, .gguf, ONNX or GPTQ folder.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 text.")],
    reference: Annotated[Path | None, typer.Option(help="A model to compare with: mean KL and top-1.")] = None,
    context: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 512,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Perplexity of a model in its runtime; with --reference also mean KL and top-1 agreement."""
    from signround.cli.output import print_json, print_lines
    from signround.cli.progress import ProgressDisplay
    from signround.evaluate import evaluate_target

    with ProgressDisplay() as progress:
        measured = evaluate_target(target, text, reference=reference, context=context, device=device, on_event=progress)
    if as_json:
        print_json(asdict(measured))
    else:
        print_lines(measured.lines())


@app.command()
def inspect(
    target: Annotated[Path, typer.Argument(help="An artifact, or a file or folder that was exported.")],
    as_json: Json = False,
) -> None:
    """What is inside: grids, sizes, histogram of codes; of ONNX folders their problems, any of which is exit code 1."""
    from signround.cli.output import print_json, print_lines
    from signround.inspection import inspect_target, inspection_lines

    found = inspect_target(target)
    if as_json:
        print_json(found)
    else:
        print_lines(inspection_lines(found))
    problems = len(found.get("problems", ()))
    if problems:
        raise FailedError(f"{target} has {'a problem' if problems == 1 else f'{problems} problems'}; see above.")


@app.command()
def schemes(as_json: Json = False) -> None:
    """Every grid, file type of llama.cpp and preset: bits per weight, which formats hold it, what it is for."""
    from signround.cli.output import print_json, print_lines, print_table
    from signround.inspection import scheme_table

    rows = scheme_table()
    if as_json:
        print_json(rows)
    else:
        cells = [(row["scheme"], f"{row['bits_per_weight']:.3f}", ", ".join(row["formats"]) or "-") for row in rows]
        grids = sum(row["kind"] == "grid" for row in rows)
        print_table(("scheme", "bits/weight", "formats"), cells[:grids])
        outer = (
            "A grid is for the linears of blocks; others get one by --tensor-type: lm_head=w8g32, embed_tokens=q8_0."
        )
        print_lines(["", outer])
        print_lines(["", "Mixes of these, embedding and head included; the bits are those of most matrices:", ""])
        mixes = [(*cell, row["description"]) for cell, row in zip(cells[grids:], rows[grids:], strict=True)]
        print_table(("file type or preset", "bits/weight", "formats", "what it is"), mixes)


def _options(
    settings: list[str] | None,
    split_max_size: str | None = None,
    gguf_template: Path | None = None,
    layout: str | None = None,
) -> dict[str, dict[str, str]]:
    """`--set gguf.float_type=f16` -> {"gguf": {"float_type": "f16"}}; the others have flags of their own."""
    options: dict[str, dict[str, str]] = {}
    if split_max_size is not None:
        options.setdefault("gguf", {})["split_max_size"] = split_max_size
    if gguf_template is not None:
        options.setdefault("gguf", {})["template"] = str(gguf_template)
    if layout is not None:
        options.setdefault("onnx", {})["layout"] = layout
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        name, dot, option = key.partition(".")
        if not (equals and dot and name and option):
            raise refuse(f"{setting!r} is not of the form FORMAT.OPTION=VALUE", "write it so", "--set")
        if options.setdefault(name, {}).setdefault(option, value) != value:
            raise refuse(f"{key} is both {options[name][option]} and {value}", "give it once", "--set")
    return options


class _Interrupts:
    """Ctrl-C raises KeyboardInterrupt, as ever, and is remembered: for the next event, should the exception be lost,
    and for the end, should native code make an error of its own of it."""

    def __enter__(self) -> None:
        from signround.cli import progress

        self._remembered = progress.INTERRUPTED
        self._remembered.clear()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and self._remembered.is_set():
            raise KeyboardInterrupt from error

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._remembered.set()
        signal.default_int_handler(number, frame)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `signround` command."""
    from signround.cli.output import print_error

    _quiet_libraries()
    try:
        with _Interrupts():
            code: Any = app(args=arguments, prog_name="signround", standalone_mode=False)
    except SignroundError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except _UsageError as error:
        print_error(_usage_refusal(error.format_message(), arguments))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_interrupted())
    if code == INTERRUPTED:
        sys.exit(_interrupted())
    sys.exit(code if isinstance(code, int) else 0)


def _usage_refusal(message: str, arguments: list[str] | None) -> RefusedError:
    """The parser's complaint ("No such option: --schem.") in the form of ours, with the help page that answers it."""
    given = sys.argv[1:] if arguments is None else arguments
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    page = f"signround {given[0]}" if given and given[0] in commands else "signround"
    problem = " ".join(message.split()).rstrip(".") or "a command is needed"
    return refuse(problem[0].lower() + problem[1:], f"see `{page} --help`")


def _interrupted() -> int:
    sys.stderr.write("signround: interrupted; finished blocks are kept, run the same command again to continue.\n")
    return 1


def _quiet_libraries() -> None:
    """Other packages' banners and deprecation notes are not for our users; errors still come through as exceptions."""
    import logging

    warnings.filterwarnings("ignore")
    for name in ("torchao", "transformers", "torch", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
