"""Prediction from model folders: the contract enforced, the outputs as the next program needs."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import pytest
from builders import make_trust
from hypothesis import given, settings
from hypothesis import strategies as st

from cectflow.flows.prediction import predict_classes
from cectflow.flows.segmentation import predict_segments
from cectflow.model_card import CARD_FILE, ModelCard, Score, VariantFigures
from cectflow.particles import read_particles
from cectflow.prediction.classify import Classification
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.segment import Segmentation, _paste
from cectflow.prediction.whole import WholeOutputs
from cectflow.quantise import quantise
from cectflow.runtime import load_runtime
from cectflow.volume import read_stack, read_volume
from cectflow.volume_writer import write_stack

VOXEL_SIZE = 12.0
OPTIONS = InputOptions(batch_size=2)


def silent(_: str) -> None:
    pass


def classify(
    model: Path, out: Path, options: InputOptions, report: Callable[[str], None], **files: Any
) -> Classification:
    return predict_classes(str(model), InputFiles(**files), out, options, report)


def segment(
    model: Path,
    out: Path,
    probabilities: Path | None,
    options: InputOptions,
    report: Callable[[str], None],
    **files: Any,
) -> Segmentation:
    outputs = WholeOutputs(out, probabilities)
    outcome = predict_segments(str(model), InputFiles(**files), outputs, options, report)
    assert isinstance(outcome, Segmentation)
    return outcome


def test_classes_of_a_stack_are_the_networks_own(
    classifier: Path, stack: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "out.star"
    outcome = classify(classifier, out, OPTIONS, silent, subtomograms=str(stack))
    logits = load_runtime(classifier)(cubes[:, None])
    rows = read_particles(out).rows
    assert rows["cectflowClassNumber"].tolist() == (logits.argmax(axis=1) + 1).tolist()
    assert rows["rlnClassNumber"].tolist() == rows["cectflowClassNumber"].tolist()
    assert rows["rlnImageName"][0] == f"000001@{stack}"
    assert rows["cectflowProbability"].between(1 / 3, 1).all()
    assert set(rows["cectflowModel"]) == {"classifier"}
    assert sum(outcome.counts.values()) == len(cubes)


def test_a_card_without_a_threshold_calls_nothing_unknown_and_says_so(
    classifier: Path, stack: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    out = tmp_path / "out.star"
    outcome = classify(classifier, out, OPTIONS, told.append, subtomograms=str(stack))
    assert outcome.num_unknown is None
    assert "cectflowUnknown" not in read_particles(out).rows
    assert "states neither a temperature nor a threshold" in told[-1]


def test_probabilities_are_calibrated_and_the_unknown_marked(
    classifier: Path, stack: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    logits = load_runtime(classifier)(cubes[:, None])
    middle = float(np.sort(logits.max(axis=1))[2:4].mean())
    trust = make_trust(temperature=0.5, unknown_score="max_logit", unknown_threshold=middle)
    model = tmp_path / "trusted"
    shutil.copytree(classifier, model)
    card = ModelCard.from_folder(model).model_copy(update={"trust": trust})
    (model / CARD_FILE).write_text(card.to_json())
    told: list[str] = []
    outcome = classify(model, tmp_path / "o.star", OPTIONS, told.append, subtomograms=str(stack))
    rows = read_particles(tmp_path / "o.star").rows
    sharp = np.exp(2.0 * (logits - logits.max(axis=1, keepdims=True)))
    np.testing.assert_allclose(rows["cectflowProbability"], 1 / sharp.sum(axis=1), atol=1e-5)
    assert rows["cectflowUnknown"].tolist() == (logits.max(axis=1) < middle).astype(int).tolist()
    # The class is still there for whoever wants it.
    assert rows["cectflowClassNumber"].tolist() == (logits.argmax(axis=1) + 1).tolist()
    assert outcome.num_unknown == 3
    assert "; 3 of them unknown; mean probability" in told[-1]


def test_a_variant_is_used_only_if_it_was_judged_and_the_table_names_it(
    classifier: Path, stack: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    options = InputOptions(batch_size=2, variant="int8")
    with pytest.raises(ValueError, match=r"was not judged in int8: expected one of float32, or"):
        classify(classifier, tmp_path / "out.star", options, silent, subtomograms=str(stack))
    folder = tmp_path / "student"
    shutil.copytree(classifier, folder)
    quantise(folder, cubes[:, None])
    exact = Score(value=1.0, low=1.0, high=1.0)
    figures = VariantFigures(
        score=exact, difference=exact, parity=0.1, speedup=2.0, runtime="openvino", threads=1
    )
    card = ModelCard.from_folder(folder).model_copy(update={"variants": {"int8": figures}})
    (folder / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    for chosen, label in ((options, "student+int8"), (OPTIONS, "student")):
        out = tmp_path / f"{label}.star"
        classify(folder, out, chosen, silent, subtomograms=str(stack))
        assert set(read_particles(out).rows["cectflowModel"]) == {label}


def test_batches_do_not_change_the_answer(classifier: Path, stack: Path, tmp_path: Path) -> None:
    tables = []
    for size in (1, 3, 64):
        out = tmp_path / f"{size}.star"
        options = InputOptions(batch_size=size)
        classify(classifier, out, options, silent, subtomograms=str(stack))
        tables.append(read_particles(out).rows)
    for table in tables[1:]:
        np.testing.assert_allclose(
            table["cectflowProbability"], tables[0]["cectflowProbability"], atol=2e-6
        )


def test_every_row_and_column_of_the_picks_is_kept_in_order(
    classifier: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.star"
    classify(classifier, out, OPTIONS, silent, tomogram=tomogram, particles=picks)
    before, after = read_particles(picks).rows, read_particles(out).rows
    pd.testing.assert_frame_equal(after[before.columns], before)
    assert {"cectflowClassName", "cectflowProbability", "cectflowModel"} <= set(after.columns)


def test_cubes_of_a_tomogram_and_the_same_cubes_in_a_stack_are_classified_alike(
    classifier: Path, tomogram: Path, picks: Path, positions_zyx: np.ndarray, tmp_path: Path
) -> None:
    data = read_volume(tomogram).data
    inside = [0, 3]
    corners = np.round(positions_zyx[inside]).astype(int) - 8
    cubes = np.stack([data[z : z + 16, y : y + 16, x : x + 16] for z, y, x in corners])
    write_stack(tmp_path / "cut.mrcs", cubes, VOXEL_SIZE)
    for name, source in (
        ("a", {"tomogram": tomogram, "particles": picks}),
        ("b", {"subtomograms": str(tmp_path / "cut.mrcs")}),
    ):
        classify(classifier, tmp_path / f"{name}.star", OPTIONS, silent, **source)
    a = read_particles(tmp_path / "a.star").rows["cectflowProbability"].to_numpy()[inside]
    b = read_particles(tmp_path / "b.star").rows["cectflowProbability"].to_numpy()
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_light_contrast_is_flipped_and_said(
    classifier: Path, stack: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    write_stack(tmp_path / "light.mrcs", -cubes, VOXEL_SIZE)
    told: list[str] = []
    classify(classifier, tmp_path / "a.star", OPTIONS, silent, subtomograms=str(stack))
    classify(classifier, tmp_path / "b.star", InputOptions(contrast="light"), told.append,
        subtomograms=str(tmp_path / "light.mrcs"),
    )  # fmt: skip
    a, b = (read_particles(tmp_path / f"{name}.star").rows for name in "ab")
    np.testing.assert_allclose(a["cectflowProbability"], b["cectflowProbability"], atol=1e-5)
    assert any("contrast: input is light, dark is expected: flipped" in line for line in told)


def test_a_larger_box_is_cropped_only_when_asked(
    classifier: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    large = np.pad(cubes, ((0, 0), (4, 4), (4, 4), (4, 4)), mode="wrap")
    write_stack(tmp_path / "large.mrcs", large, VOXEL_SIZE)
    pattern = str(tmp_path / "large.mrcs")
    with pytest.raises(ValueError, match=r"24³: expected 16³; give --rescale"):
        classify(classifier, tmp_path / "o.star", OPTIONS, silent, subtomograms=pattern)
    told: list[str] = []
    options = InputOptions(rescale=True)
    classify(classifier, tmp_path / "o.star", options, told.append, subtomograms=pattern)
    assert any("rescale: 24³ at 12 Å" in line and "cropped to 16³" in line for line in told)


@pytest.mark.parametrize(
    ("box", "voxel_size", "message"),
    [
        (16, 10.0, r"16³ at 10 Å span 160 Å: expected at least 192 Å .*box of at least 20"),
        (24, 10.0, r"voxel size is 10 Å: expected 12 Å; give --rescale to resample"),
        (12, 12.0, r"12³ at 12 Å span 144 Å"),
    ],
)
def test_input_that_breaks_the_contract_is_refused_with_the_remedy(
    classifier: Path, tmp_path: Path, box: int, voxel_size: float, message: str
) -> None:
    write_stack(tmp_path / "s.mrcs", np.zeros((2, box, box, box), np.float32), voxel_size)
    out = tmp_path / "out.star"
    with pytest.raises(ValueError, match=message):
        classify(classifier, out, OPTIONS, silent, subtomograms=str(tmp_path / "s.mrcs"))
    assert not out.exists()


def test_rescaled_tomogram_is_cut_larger_and_segmented_on_its_own_grid(
    segmenter: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    options = InputOptions(rescale=True, voxel_size=10.0)
    segment(segmenter, tmp_path / "l.mrc", None, options, told.append,
        tomogram=tomogram, particles=picks,
    )  # fmt: skip
    assert any("cutting 21³ at 10 Å" in line for line in told)
    assert read_volume(tmp_path / "l.mrc").data.shape == read_volume(tomogram).data.shape


def test_label_map_names_the_particle_of_each_voxel(
    segmenter: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    out, probabilities = tmp_path / "labels.mrc", tmp_path / "p.mrc"
    outcome = segment(
        segmenter, out, probabilities, OPTIONS, silent, tomogram=tomogram, particles=picks
    )
    labels, foreground = read_volume(out), read_volume(probabilities)
    assert labels.data.dtype == np.int16
    assert labels.data.shape == foreground.data.shape == read_volume(tomogram).data.shape
    assert labels.voxel_size == pytest.approx(VOXEL_SIZE)
    assert set(np.unique(labels.data)) <= {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(labels.data > 0, foreground.data > 0.5)
    assert outcome.num_particles == 4
    with mrcfile.open(out, header_only=True) as file:
        assert any("segmenter" in line for line in file.get_labels())


def test_label_stack_marks_the_target(segmenter: Path, stack: Path, tmp_path: Path) -> None:
    segment(segmenter, tmp_path / "l.mrcs", tmp_path / "p.mrcs", OPTIONS, silent,
        subtomograms=str(stack),
    )  # fmt: skip
    labels, voxel_size = read_stack(tmp_path / "l.mrcs")
    probabilities, _ = read_stack(tmp_path / "p.mrcs")
    assert labels.dtype == np.int8
    assert voxel_size == pytest.approx(VOXEL_SIZE)
    np.testing.assert_array_equal(labels == 1, probabilities > 0.5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-6, 14)] * 3), min_size=1, max_size=4))
def test_a_contested_voxel_belongs_to_the_more_probable_particle(
    centres: list[tuple[int, int, int]],
) -> None:
    best, owner = np.zeros((9, 9, 9), np.float32), np.zeros((9, 9, 9), np.int16)
    generator = np.random.default_rng(0)
    stacked = np.zeros((len(centres), 9, 9, 9), np.float32)
    for number, centre in enumerate(centres):
        cube = generator.random((4, 4, 4)).astype(np.float32)
        _paste(cube, np.array(centre), number + 1, best, owner)
        for index in np.ndindex(4, 4, 4):
            at = np.array(centre) - 2 + index
            if (at >= 0).all() and (at < 9).all():
                stacked[number][tuple(at)] = cube[index]
    np.testing.assert_array_equal(best, stacked.max(axis=0))
    expected = np.where(stacked.max(axis=0) > 0.5, stacked.argmax(axis=0) + 1, 0)
    np.testing.assert_array_equal(owner, expected)


def test_folder_and_glob_are_read_in_the_order_of_their_names(
    classifier: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "cubes"
    folder.mkdir()
    for index, cube in enumerate(cubes):
        write_stack(folder / f"{index}.mrc", cube[None], VOXEL_SIZE)
    with (folder / "0.mrc").open("rb") as plain, gzip.open(folder / "0.mrc.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    (folder / "0.mrc").unlink()
    (folder / "notes.txt").write_text("not a volume")
    for name, pattern in (("folder", str(folder)), ("glob", str(folder / "*.mrc*"))):
        out = tmp_path / f"{name}.star"
        classify(classifier, out, OPTIONS, silent, subtomograms=pattern)
        names = read_particles(out).rows["rlnImageName"].tolist()
        assert [name.rpartition("/")[2] for name in names] == [
            "0.mrc.gz", "1.mrc", "2.mrc", "3.mrc", "4.mrc",
        ]  # fmt: skip


def test_output_is_refused_before_work_and_kept(
    classifier: Path, stack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.star"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="give another --out, or --overwrite"):
        classify(classifier, out, OPTIONS, silent, subtomograms=str(stack))
    assert out.read_text() == "mine"
    options = InputOptions(overwrite=True)
    classify(classifier, out, options, silent, subtomograms=str(stack))
    assert "cectflowClassName" in out.read_text()


def test_an_output_is_never_the_input_nor_another_output(
    segmenter: Path, stack: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    options = InputOptions(overwrite=True)
    files = {"tomogram": tomogram, "particles": picks}
    before = tomogram.read_bytes()
    with pytest.raises(ValueError, match=f"{tomogram.name} is the input"):
        segment(segmenter, tomogram, None, options, silent, **files)
    with pytest.raises(ValueError, match=f"{tomogram.name} is the input"):
        segment(segmenter, tmp_path / "l.mrc", tomogram, options, silent, **files)
    with pytest.raises(ValueError, match=f"{stack.name} is the input"):
        segment(segmenter, stack, None, options, silent, subtomograms=str(stack))
    both = tmp_path / "both.mrc"
    with pytest.raises(ValueError, match=r"both.mrc is given for two outputs"):
        segment(segmenter, both, both, options, silent, **files)
    with pytest.raises(ValueError, match=r"l.mrc.gz would be an MRC file: expected a name in .mrc"):
        segment(segmenter, tmp_path / "l.mrc.gz", None, options, silent, **files)
    assert tomogram.read_bytes() == before
    assert not both.exists()


def test_picks_without_a_particle_are_refused(
    classifier: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    table = read_particles(picks)
    table.select(np.zeros(len(table), bool)).write(tmp_path / "none.star")
    files = {"tomogram": tomogram, "particles": tmp_path / "none.star"}
    with pytest.raises(ValueError, match=r"none.star holds no particles"):
        classify(classifier, tmp_path / "o.star", OPTIONS, silent, **files)


def test_wrong_task_names_the_command_that_fits(
    classifier: Path, segmenter: Path, stack: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="use `cectflow predict segment`"):
        classify(segmenter, tmp_path / "o.star", OPTIONS, silent, subtomograms=str(stack))
    with pytest.raises(ValueError, match="use `cectflow predict classify`"):
        segment(classifier, tmp_path / "o.mrcs", None, OPTIONS, silent, subtomograms=str(stack))


def test_a_whole_tomogram_without_particles_names_the_model_that_takes_it(
    classifier: Path, segmenter: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    expected = r"known positions: give --particles PICKS.star.*cectflow-tomogram-segmenter"
    with pytest.raises(ValueError, match=expected):
        classify(classifier, tmp_path / "o.star", OPTIONS, silent, tomogram=tomogram)
    with pytest.raises(ValueError, match=expected):
        segment(segmenter, tmp_path / "o.mrc", None, OPTIONS, silent, tomogram=tomogram)
    with pytest.raises(ValueError, match="need a semantic segmenter"):
        predict_segments(
            str(segmenter), InputFiles(tomogram=tomogram, particles=picks),
            WholeOutputs(tmp_path / "o.mrc", picks=tmp_path / "p.star"), OPTIONS, silent,
        )  # fmt: skip
    assert not (tmp_path / "o.mrc").exists()


def test_a_damaged_file_is_refused_before_any_output(
    classifier: Path, stack: Path, tmp_path: Path
) -> None:
    stack.write_bytes(stack.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"truncated|bytes"):
        classify(classifier, tmp_path / "o.star", OPTIONS, silent, subtomograms=str(stack))
    assert not (tmp_path / "o.star").exists()


def test_missing_input_says_what_was_expected(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no subtomograms at .*expected a file, a folder"):
        classify(classifier, tmp_path / "o.star", OPTIONS, silent, subtomograms="nothing/*.mrc")
    with pytest.raises(ValueError, match="either --subtomograms, or --tomogram together"):
        classify(classifier, tmp_path / "o.star", OPTIONS, silent)


def test_real_ribosomes_are_read_as_they_are(
    classifier: Path, shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "real" / "ribosome_70s" / "ribosome_70s.mrcs"
    told: list[str] = []
    options = InputOptions(rescale=True, contrast="light")
    out = tmp_path / "real.star"
    classify(classifier, out, options, told.append, subtomograms=str(path))
    assert len(read_particles(out).rows) == 20
    assert any("32³ at 12 Å" in line for line in told)


def test_prediction_imports_no_training_library(
    classifier: Path, stack: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from cectflow.flows.prediction import predict_classes\n"
        "from cectflow.prediction.contract import InputOptions\n"
        "from cectflow.prediction.inputs import InputFiles\n"
        f"predict_classes({str(classifier)!r}, InputFiles({str(stack)!r}),"
        f" Path({str(tmp_path / 'o.star')!r}), InputOptions(device='cpu'), print)\n"
        "heavy = {'lightning_fabric', 'torchmetrics', 'mlflow', 'torch', 'scipy', 'numba',"
        " 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)


def test_labels_open_in_mrcfile_without_complaint(
    segmenter: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    segment(segmenter, tmp_path / "l.mrc", None, OPTIONS, silent,
        tomogram=tomogram, particles=picks,
    )  # fmt: skip
    assert mrcfile.validate(tmp_path / "l.mrc")


def test_a_cube_with_values_that_are_not_finite_is_listed_and_the_others_are_predicted(
    classifier: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    write_stack(tmp_path / "wrong.mrcs", cubes, 12.0)
    with mrcfile.open(tmp_path / "wrong.mrcs", mode="r+") as file:
        file.data[4, 3, 3, 3] = np.nan
    told: list[str] = []
    out = tmp_path / "out.star"
    outcome = classify(classifier, out, OPTIONS, told.append,
                       subtomograms=str(tmp_path / "wrong.mrcs"))  # fmt: skip
    rows = read_particles(out).rows
    assert rows["cectflowClassName"].tolist()[4] == "none"
    assert rows["cectflowClassNumber"].tolist()[4] == rows["cectflowProbability"].tolist()[4] == 0
    assert (rows["cectflowClassNumber"][:4] > 0).all()
    assert sum(outcome.counts.values()) == 4
    listed = pd.read_csv(tmp_path / "out_failures.csv")
    assert listed["row"].tolist() == [5]
    assert "wrong.mrcs: subtomogram 5 holds values that are not finite" in listed["reason"][0]
    assert any("1 of 5 particles could not be predicted" in line for line in told)
