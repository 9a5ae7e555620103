"""Exchange: dataset folders described in facts, and written for RELION."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cectflow.coordinates import PIXEL_SIZES, PLACEMENT_COLUMNS
from cectflow.dataset import open_dataset
from cectflow.files import appearing, refuse_existing_folder
from cectflow.manifest import SPLITS, Manifest, SplitName, read_manifest
from cectflow.particles import ParticleTable, read_particles
from cectflow.progress import track
from cectflow.subtomogram import flip_contrast
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

__all__ = ["describe_dataset", "export_relion"]


def describe_dataset(folder: Path) -> dict[str, Any]:
    """Facts of a dataset folder that JSON can hold; lengths in Å.

    The measured SNR and occupancy are means over the fields of all splits. Of an incomplete folder
    ``missing_shards`` says how many shards of each split are not finished.

    Raises
    ------
    FileNotFoundError
        If the folder has no manifest, or a file that the manifest lists is missing.
    ValueError
        If the manifest is not valid.
    """
    manifest = read_manifest(folder)
    records = [record for split in SPLITS for record in manifest.field_records(split)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "kind": manifest.kind,
        "complete": manifest.is_complete,
        "missing_shards": {
            split: planned - len(manifest.shards.get(split, ()))
            for split, planned in manifest.planned_shards.items()
        },
        "classes": list(manifest.classes),
        "box": manifest.box,
        "voxel_size": manifest.voxel_size,
        "contrast": manifest.contrast,
        "ctf_correction": manifest.ctf_correction,
        "tilt_range": list(manifest.tilt_range),
        "voxel_labels": manifest.has_voxel_labels,
        "subtomograms": {split: manifest.count(split) for split in SPLITS},
        "subtomograms_per_class": {
            split: _count_classes(folder, manifest, split) for split in SPLITS
        },
        "fields": {split: len(manifest.field_records(split)) for split in SPLITS},
        "snr_stage": manifest.snr_stage,
        "requested_snr": None if manifest.snr is None else list(manifest.snr),
        "measured_snr": _mean([record.snr for record in records]),
        "measured_snr_60": _mean([record.snr_60 for record in records]),
        "requested_occupancy": manifest.occupancy,
        "measured_occupancy": _mean([record.occupancy for record in records]),
        "jitter": manifest.jitter,
        "recipe_digest": manifest.recipe_digest,
        "content_digest": manifest.content_digest(),
        "commit": manifest.commit,
        "size_bytes": sum(path.stat().st_size for path in files),
    }


def export_relion(folder: Path, out: Path, split: SplitName) -> Path:
    """``particles.star`` of a new folder that holds one split as RELION reads it.

    One float32 .mrc per particle with bright protein, and a particle table of RELION 4's form.
    Positions and angles are those of the dataset, where it has any; coordinates whose pixel size is
    not stated are in voxels of the cubes. RELION asks for voltage and spherical aberration: where
    no recipe states them 300 kV and 2.7 mm are written.

    Parameters
    ----------
    folder
        Dataset folder.
    out
        To be made; it may exist if it is empty.
    split
        Which one.

    Raises
    ------
    FileExistsError
        If ``out`` exists and is not empty.
    ValueError
        If the dataset is incomplete or has no such split.
    """
    refuse_existing_folder(out)
    dataset = open_dataset(folder)
    source = dataset.split(split)
    names = [f"subtomograms/{number:06d}.mrc" for number in range(1, len(source) + 1)]
    with appearing(out) as temporary:
        (temporary / "subtomograms").mkdir()
        numbers = iter(names)
        batches = track(source.batches(64), total=-(-len(source) // 64), title="exporting")
        for batch in batches:
            for cube in flip_contrast(batch.subtomograms[:, 0].numpy()):
                write_volume(temporary / next(numbers), Volume(cube, dataset.manifest.voxel_size))
        table = _relion_table(source.rows.assign(rlnImageName=names), dataset.manifest)
        table.write(temporary / "particles.star")
    return out / "particles.star"


def _relion_table(rows: pd.DataFrame, manifest: Manifest) -> ParticleTable:
    """Blocks ``optics``, one group for each pixel size of the coordinates, and ``particles``."""
    microscope = manifest.recipe.get("microscope", {})
    pixel_sizes = np.full(len(rows), manifest.voxel_size)
    if PIXEL_SIZES[0] in rows:
        pixel_sizes = rows[PIXEL_SIZES[0]].to_numpy(np.float64)
    groups, group_of = np.unique(pixel_sizes, return_inverse=True)
    numbers = np.arange(1, len(groups) + 1)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": numbers,
            "rlnOpticsGroupName": [f"opticsGroup{number}" for number in numbers],
            "rlnVoltage": microscope.get("voltage_kv", 300.0),
            "rlnSphericalAberration": microscope.get("spherical_aberration_mm", 2.7),
            "rlnAmplitudeContrast": microscope.get("amplitude_contrast", 0.1),
            "rlnTomoTiltSeriesPixelSize": groups,
            "rlnImagePixelSize": manifest.voxel_size,
            "rlnImageSize": manifest.box,
            "rlnImageDimensionality": 3,
            "rlnCtfDataAreCtfPremultiplied": int(manifest.ctf_correction == "premultiplied"),
        }
    )
    columns = ["rlnClassNumber", "cectflowClassName", "rlnTomoName", "rlnImageName"]
    kept = [name for name in map(str, rows) if PLACEMENT_COLUMNS.fullmatch(name)]
    kept = [name for name in kept if name != PIXEL_SIZES[0]]
    particles = rows[[*columns, *kept]].assign(rlnOpticsGroup=group_of + 1)
    return ParticleTable({"optics": optics, "particles": particles}, "particles")


def _count_classes(folder: Path, manifest: Manifest, split: SplitName) -> dict[str, int]:
    counts: Counter[int] = Counter()
    for shard in manifest.shards.get(split, ()):
        counts.update(read_particles(folder / f"{shard.name}.star").rows["rlnClassNumber"])
    return {name: counts[class_id] for class_id, name in enumerate(manifest.classes, start=1)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
