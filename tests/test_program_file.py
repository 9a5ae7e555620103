"""Programs that bring code along are refused; what torch.export writes is not."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinySegmenter

from cectflow.program_file import check_program
from cectflow.runtime import load_program

CALL = "__import__('os').system('false')"
MODEL = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"

Edit = Callable[[dict[str, bytes]], None]


class Calling:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("a pickle was read",)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported segmenter with dynamic batch and edges, which has guards and symbolic shapes."""
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    dimensions: dict[int, Any] = {0: torch.export.Dim("n")}
    dimensions |= {axis: 2 * torch.export.Dim(f"d{axis}", min=2) for axis in (2, 3, 4)}
    exported = torch.export.export(
        TinySegmenter().eval(), (torch.zeros(2, 1, 8, 10, 12),), dynamic_shapes=(dimensions,),
        strict=False,
    )  # fmt: skip
    torch.export.save(exported, path)
    return path


def changed(program: Path, folder: Path, edit: Edit, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(program) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    records = {name.partition("/")[2]: content for name, content in records.items()}
    edit(records)
    with zipfile.ZipFile(folder / "model.pt2", "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"model/{name}", content)
    return folder / "model.pt2"


def in_graph(change: Callable[[dict[str, Any]], None]) -> Edit:
    def edit(records: dict[str, bytes]) -> None:
        content = json.loads(records[MODEL])
        change(content)
        records[MODEL] = json.dumps(content).encode()

    return edit


def in_node(**fields: Any) -> Edit:
    return in_graph(lambda content: content["graph_module"]["graph"]["nodes"][0].update(fields))


def in_shapes(content: dict[str, Any]) -> None:
    text = json.dumps(content).replace("Symbol('", f"{CALL} or Symbol('")
    content.update(json.loads(text))


def in_trees(content: dict[str, Any]) -> None:
    signature = content["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.tuple", "os.stat_result")


def in_names(content: dict[str, Any]) -> None:
    text = json.dumps(content).replace('"cubes"', json.dumps(f"cubes: {CALL}"))
    content.update(json.loads(text))


def pickled_inputs(records: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    torch.save(((Calling(),), {}), buffer)
    records[INPUTS] = buffer.getvalue()


def plain_pickle(records: dict[str, bytes]) -> None:
    records[INPUTS] = pickle.dumps(((Calling(),), {}))


def pickled_weight(records: dict[str, bytes]) -> None:
    content = json.loads(records[WEIGHTS])
    next(iter(content["config"].values()))["use_pickle"] = True
    records[WEIGHTS] = json.dumps(content).encode()


def test_what_torch_exports_passes_and_still_computes(program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        model = next(name for name in archive.namelist() if name.endswith(MODEL))
        content = archive.read(model).decode()
    assert "Symbol(" in content
    assert json.loads(content)["guards_code"]
    check_program(program)
    copy = changed(program, tmp_path, lambda _: None)
    network = load_program(copy.parent)
    assert network(torch.zeros(3, 1, 8, 8, 8)).shape == (3, 2, 8, 8, 8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (in_graph(lambda content: content.update(guards_code=[CALL])), "guards_code is \"__import"),
        (in_graph(in_shapes), "expr_str is"),
        (in_graph(in_trees), "in_spec is"),
        (in_graph(in_names), "is \"cubes: __import__"),
        (in_node(target="torch.os.system"), r"target is 'torch\.os\.system'"),
        (in_node(target="torch.ops.aten.from_file.default"), "target is"),
        (in_node(target="_operator.attrgetter"), "target is"),
        (pickled_inputs, r"model\.pt asks for (__builtin__|builtins) print"),
        (plain_pickle, r"sample_inputs/model\.pt is a pickle"),
        (pickled_weight, "'.*' is a pickle or not in the file"),
        (lambda records: records.update({"data/aotinductor/model/a.so": b""}), "a.so' is unknown"),
        (lambda records: records.update({"data/weights/model.pt": b""}), "model.pt' is unknown"),
        (lambda records: records.update({"Models/model.json": b"{}"}), "Models/.* is unknown"),
        (lambda records: records.update({"../../model.py": b""}), "is unknown"),
        (lambda records: records.update({MODEL: b"{"}), "is no JSON"),
        (lambda records: records.pop(MODEL), "holds no models/model.json"),
    ],
)  # fmt: skip
def test_a_program_that_brings_code_along_is_refused(
    program: Path, tmp_path: Path, edit: Edit, message: str
) -> None:
    path = changed(program, tmp_path, edit)
    with pytest.raises(
        ValueError, match=rf"is refused, since loading it could run code: .*{message}"
    ):
        load_program(path.parent)


def test_a_compressed_archive_is_refused(program: Path, tmp_path: Path) -> None:
    path = changed(program, tmp_path, lambda _: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        check_program(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(pickle.dumps(Calling()))
    with pytest.raises(ValueError, match=r"model\.pt2 is no exported torch program"):
        load_program(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a model folder"):
        load_program(tmp_path / "nowhere")
