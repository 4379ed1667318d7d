"""The artifact: a quantised checkpoint on disk, written block by block, each file whole or absent.

    artifact/
      manifest.json            schema, plan, calibration hash, sha256 of every finished file
      blocks/00000.safetensors codes and fields of each linear, plus the block's norms and biases
      blocks/00000.json        how the block's tuning went (times; the only file that differs between equal runs)
      outer/*.safetensors      embedding, final norm, head: one file each (codes and fields where quantised)
      model/                   config.json and tokenizer files
      calibration.safetensors  the tokens that were used

A linear's parts are stored as `<weight name>.codes` (uint8 [rows, columns]) and `<weight name>.<field>`
(`Grid.layout`); beside them, where the calibration pass saw its inputs, `<weight name>.input_squares` (float32
[columns], summed) and `<weight name>.input_tokens` (int64 [1]). The manifest is the only truth: a file that it does
not name, with its hash, does not exist.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from signround.errors import FailedError, refuse
from signround.files import disk_errors, sha256_of, sha256_of_json, write_json, written_whole
from signround.importance import Importance, InputSquares
from signround.parallel import in_order
from signround.plan import KeptTensor, LayerPlan, ModelPlan
from signround.qtensor import QuantizedTensor
from signround.safetensors_stream import save_tensors

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENS = "calibration.safetensors"
SQUARES, SEEN_TOKENS = "input_squares", "input_tokens"


@dataclass(frozen=True)
class BlockRecord:
    """How the tuning of one block went; losses as in `events.BlockTuned`. `expert_tokens`: how many calibration tokens
    each expert was given (mixture of experts; empty where nothing was tuned)."""

    index: int
    seconds: float
    loss_rounded: float
    loss_tuned: float
    kept: dict[str, str]
    peak_rss_bytes: int
    peak_device_bytes: int
    expert_tokens: dict[str, int] = field(default_factory=dict)


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def block_file(index: int) -> str:
    return f"blocks/{index:05d}.safetensors"


def outer_file(name: str) -> str:
    return f"outer/{name}.safetensors"


def artifact_bytes(plan: ModelPlan) -> int:
    """Size of the artifact to come: a byte a code, the stored fields, and the kept tensors."""
    total = sum(math.prod(kept.shape) * kept.torch_dtype.itemsize for kept in plan.kept())
    for layer in plan.layers():
        total += layer.rows * layer.columns
        total += sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in layer.grid.layout(layer.rows, layer.columns).values()
        )
    return total


class QuantizedCheckpoint:
    """Lazy reader of a finished artifact. Raises RefusedError when the folder holds none, or an unfinished one."""

    def __init__(self, folder: str | Path, *, allow_unfinished: bool = False) -> None:
        self.folder = Path(folder)
        if not is_artifact(self.folder):
            inner = self.folder / "artifact"
            given = f"{inner}" if is_artifact(inner) else "the artifact/ folder that `signround quantize` wrote"
            raise refuse("the folder holds no signround artifact (no manifest.json)", f"give {given}", str(folder))
        self.manifest = _read_manifest(self.folder)
        if not (self.manifest["complete"] or allow_unfinished):
            raise refuse(
                "the artifact is not finished",
                "run the same `signround quantize` command again, it continues",
                str(folder),
            )

    @cached_property
    def plan(self) -> ModelPlan:
        return ModelPlan.from_json(self.manifest["plan"], self.manifest["model"], self.folder / "model")

    @property
    def fingerprint(self) -> str:
        """Hash over plan and every finished file: equal fingerprints mean equal tuned models."""
        return sha256_of_json([self.manifest["plan"], self.manifest["files"]])

    @cached_property
    def layers(self) -> dict[str, LayerPlan]:
        """Weight name -> plan of every quantised linear, in model order."""
        return {layer.name: layer for layer in self.plan.layers()}

    @cached_property
    def kept(self) -> dict[str, KeptTensor]:
        """Name -> plan of every tensor that was carried unchanged."""
        return {kept.name: kept for kept in self.plan.kept()}

    @cached_property
    def _file_of(self) -> dict[str, str]:
        outer = [kept.name for kept in self.plan.outer] + [layer.name for layer in self.plan.outer_layers]
        files = {name: outer_file(name) for name in outer}
        for block in self.plan.blocks:
            names = [part.name for part in block.layers] + [part.name for part in block.kept]
            files |= dict.fromkeys(names, block_file(block.index))
        return files

    def quantized(self, name: str, rows: range | None = None) -> QuantizedTensor:
        """The integers and fields of linear `name`; one tensor is read, or only neighbouring `rows` of it."""
        grid = self.layers[name].grid
        layout = grid.layout(self.layers[name].rows, self.layers[name].columns)
        parts = self._read(name, ["codes", *layout], rows)
        return QuantizedTensor(grid, parts.pop("codes"), parts)

    def tensor(self, name: str, rows: range | None = None) -> Tensor:
        """The kept tensor `name` in its own dtype, or only neighbouring `rows` of it."""
        return self._read(name, [""], rows)[""]

    def weight(self, name: str) -> Tensor:
        """float32: the decoded weight of a linear, or a kept tensor."""
        return self.quantized(name).decode() if name in self.layers else self.tensor(name).float()

    def importance(self) -> Importance | None:
        """The inputs that calibration saw, of every weight that has them; None when nothing was measured. They are
        small (a number a column), so all are read."""
        squares = {}
        for name in self.layers:
            parts = self._read(name, [SQUARES, SEEN_TOKENS], optional=True)
            if parts:
                squares[name] = InputSquares(parts[SQUARES][None], parts[SEEN_TOKENS])
        tuning = self.plan.tuning
        dataset = str((self.manifest["calibration"] or {}).get("source", self.plan.calibration.source))
        if self.plan.imatrix_sha256:  # what it did not hold was measured
            dataset += f", importance matrix {self.plan.imatrix_sha256[:12]}"
        return Importance(squares, dataset, tuning.samples, tuning.seqlen) if squares else None

    def records(self) -> list[BlockRecord]:
        """How each finished block was tuned."""
        paths = [self.folder / block_file(block.index) for block in self.plan.blocks]
        return [BlockRecord(**json.loads(path.with_suffix(".json").read_text())) for path in paths if path.is_file()]

    def damaged(self) -> list[str]:
        """Files whose bytes are not those of the manifest (missing ones included)."""
        files = self.manifest["files"]
        checks = (partial(_intact, self.folder / name, digest) for name, digest in files.items())
        with closing(in_order(checks)) as intact:
            return [name for name, whole in zip(files, intact, strict=True) if not whole]

    def _read(
        self, name: str, parts: list[str], rows: range | None = None, *, optional: bool = False
    ) -> dict[str, Tensor]:
        """Copies of the parts. The file is opened for each call: pages of a mapping count as resident memory."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                if optional and f"{name}.{parts[0]}" not in file.keys():  # noqa: SIM118  # not iterable
                    return {}
                keys = {part: f"{name}.{part}" if part else name for part in parts}
                if rows is None:
                    return {part: file.get_tensor(key).clone() for part, key in keys.items()}
                return {part: file.get_slice(key)[rows.start : rows.stop].clone() for part, key in keys.items()}
        except (OSError, SafetensorError) as error:
            raise FailedError(
                f"{path}: cannot be read ({str(error).splitlines()[0]}); "
                "run the `signround quantize` command that made it again, it repairs the artifact."
            ) from error


class ArtifactWriter:
    """Writes an artifact block by block; opened again on the same plan it knows what is already there.

    Raises RefusedError when the folder holds something else, another plan (both fingerprints are named), or is in use.
    """

    def __init__(self, folder: Path, plan: ModelPlan, model_files: list[Path]) -> None:
        self.folder = folder
        self.plan = plan
        if folder.exists() and not folder.is_dir():
            raise refuse("a file of this name exists where a folder is needed", "choose another -o folder", str(folder))
        if folder.is_dir() and any(folder.iterdir()) and not is_artifact(folder) and not (folder / ".lock").exists():
            raise refuse(
                "the folder holds something that is not a signround artifact",
                "choose an empty or new -o folder",
                str(folder),
            )
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
        with ExitStack() as failure:  # or a second try in this process would find the folder in use
            failure.callback(self._lock.close)
            self.manifest = self._begun()  # read under the lock: another run may just have finished
            for path in model_files:
                self._copy(path, f"model/{path.relative_to(model_files[0].parent).as_posix()}")
            self._save_manifest()
            failure.pop_all()

    def close(self) -> None:
        self._lock.close()

    def _begun(self) -> dict[str, Any]:
        """The manifest of the folder, if it is of this plan; a new one for a new folder."""
        if is_artifact(self.folder):
            manifest = _read_manifest(self.folder)
            self._same_plan(manifest["plan"])
            return manifest
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.plan.model,
            "plan": self.plan.identity,
            "calibration": None,
            "files": {},
            "complete": False,
        }

    def _same_plan(self, old: Mapping[str, Any]) -> None:
        theirs, ours = sha256_of_json(old), self.plan.fingerprint
        if theirs == ours:
            return
        new = self.plan.identity
        differing = [key for key in new if old.get(key) != new[key]]
        raise refuse(
            f"the folder holds an artifact of another job (fingerprint {theirs[:12]}, this one is {ours[:12]}; "
            f"they differ in {', '.join(differing)})",
            "choose another -o folder, or delete this one to start again",
            str(self.folder),
        )

    def set_calibration(self, record: Mapping[str, Any]) -> None:
        """Note source, tokens and sha256 of the calibration; refuse when the folder was begun with other tokens."""
        known = self.manifest["calibration"]
        if known is not None and known["sha256"] != record["sha256"]:
            raise refuse(
                f"the folder was begun with other calibration tokens (sha256 {known['sha256'][:12]}, "
                f"these have {record['sha256'][:12]})",
                "choose another -o folder, or delete this one to start again",
                str(self.folder),
            )
        self.manifest["calibration"] = dict(record)
        self._save_manifest()

    def has_block(self, index: int) -> bool:
        """Whether block `index` is finished and undamaged."""
        return self._has(block_file(index))

    def commit_block(
        self,
        index: int,
        quantized: Mapping[str, QuantizedTensor],
        kept: Mapping[str, Tensor],
        record: BlockRecord,
        inputs: Mapping[str, InputSquares],
    ) -> None:
        """Write one finished block; when this returns, a kill loses nothing of it."""
        tensors = dict(kept)
        for name, tensor in quantized.items():
            tensors |= _parts(name, tensor, inputs.get(name))
        write_json((self.folder / block_file(index)).with_suffix(".json"), asdict(record))
        self._commit(block_file(index), tensors)

    def commit_outer(self, name: str, tensor: Tensor) -> None:
        """Write one tensor outside the blocks, unless it is there already."""
        if not self.has_outer(name):
            self._commit(outer_file(name), {name: tensor})

    def has_outer(self, name: str) -> bool:
        """Whether tensor `name` outside the blocks is there, undamaged."""
        return self._has(outer_file(name))

    def commit_outer_layer(self, name: str, tensor: QuantizedTensor, inputs: InputSquares | None) -> None:
        """Write one quantised tensor outside the blocks."""
        self._commit(outer_file(name), _parts(name, tensor, inputs))

    def finish(self) -> QuantizedCheckpoint:
        """Mark the artifact complete."""
        self.manifest["files"] = dict(sorted(self.manifest["files"].items()))
        self.manifest["complete"] = True
        self._save_manifest()
        return QuantizedCheckpoint(self.folder)

    def _has(self, name: str) -> bool:
        digest = self.manifest["files"].get(name)
        return digest is not None and _intact(self.folder / name, digest)

    def _commit(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with written_whole(self.folder / name) as temporary:
            save_tensors(temporary, tensors)
            digest = sha256_of(temporary)
        self.manifest["files"][name] = digest
        self._save_manifest()

    def _copy(self, source: Path, name: str) -> None:
        if not self._has(name):
            with written_whole(self.folder / name) as temporary:
                shutil.copyfile(source, temporary)
                self.manifest["files"][name] = sha256_of(temporary)

    def _save_manifest(self) -> None:
        write_json(self.folder / MANIFEST, self.manifest)


def _parts(name: str, tensor: QuantizedTensor, inputs: InputSquares | None) -> dict[str, Tensor]:
    parts = {f"{name}.codes": tensor.codes}
    parts |= {f"{name}.{field}": value for field, value in tensor.fields.items()}
    if inputs is not None:
        parts |= {f"{name}.{SQUARES}": inputs.sums[0].cpu(), f"{name}.{SEEN_TOKENS}": inputs.counts.cpu()}
    return parts


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        version = manifest["schema_version"]
        if version == SCHEMA_VERSION:
            _ = [manifest[key] for key in ("model", "plan", "calibration", "files", "complete")]
    except (ValueError, KeyError, TypeError) as error:
        raise refuse("manifest.json is damaged", "delete the folder and start again", str(folder)) from error
    if version != SCHEMA_VERSION:
        raise refuse(
            f"the artifact has schema {version}, this release reads {SCHEMA_VERSION}",
            "use the release that wrote it, or make it again",
            str(folder),
        )
    return manifest


def _locked(folder: Path) -> IO[str]:
    lock = open(folder / ".lock", "w")  # noqa: SIM115  # held until close()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise refuse(
            "another signround run is writing to this folder", "wait for it, or choose another", str(folder)
        ) from error
    return lock
