"""Segmentation with a registered version or a model folder: of particles, or of whole tomograms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cectflow.execution import HERE, Workplace
from cectflow.files import refuse_existing
from cectflow.flows.prediction import find_network
from cectflow.model_card import ModelCard
from cectflow.prediction.contract import InputOptions, NetworkFiles, open_once, share_threads
from cectflow.prediction.inputs import PLACEHOLDER, InputFiles
from cectflow.prediction.journal import begun_outputs
from cectflow.prediction.many import ManyOutputs, ManySegmentation, segment_many
from cectflow.prediction.matching import require_spectrum, settle_spectrum
from cectflow.prediction.picks import PickRules, check_pick_name
from cectflow.prediction.segment import Segmentation, segment_stack, segment_tomogram
from cectflow.prediction.whole import WholeOptions, WholeOutputs, WholeSegmentation, segment_whole
from cectflow.volume import STACK_SUFFIXES

__all__ = ["predict_segments"]

Report = Callable[[str], None]
Outcome = Segmentation | WholeSegmentation | ManySegmentation


def predict_segments(
    model: str,
    files: InputFiles,
    outputs: WholeOutputs,
    options: InputOptions,
    report: Report,
    *,
    whole: WholeOptions | None = None,
    where: Workplace = HERE,
    dry_run: bool = False,
) -> Outcome | None:
    """Label maps of tomograms, or of the particles of one, or label stack of subtomograms.

    Parameters
    ----------
    model, files, options, report
        As for :func:`~cectflow.flows.prediction.predict_classes`, with a target segmenter, or with
        a semantic segmenter and tomograms alone.
    outputs
        Label map (int16: row number of the particle; of a semantic segmenter int8: number of the
        label) or label stack (int8: 1 is the target); probabilities of the foreground, float32;
        picks and figure only of whole tomograms. Where the name of the label map holds
        ``{name}`` it stands for that of each tomogram, of which there may be many.
    whole
        How to run over a whole tomogram; None: as is best for most.
    where
        Processes, for many tomograms.
    dry_run
        Check and tell, and do nothing; the outcome is None.

    Raises
    ------
    ValueError
        If the network's task and the files do not fit; the message names the model that does.
    """
    given_paths = [path for path in outputs.paths if path is not None]
    single = [path for path in given_paths if PLACEHOLDER not in path.name]
    refuse_existing(
        single, overwrite=options.overwrite, inputs=files.volumes,
        begun=begun_outputs(outputs.labels),
    )  # fmt: skip
    for path in (outputs.labels, outputs.probabilities):
        if path is not None and path.suffix not in STACK_SUFFIXES:
            msg = f"{path} would be an MRC file: expected a name in {', '.join(STACK_SUFFIXES)}"
            raise ValueError(msg)
    network = find_network(
        model, ("target", "semantic"), options.device,
        runtime=options.runtime, variant=options.variant,
    )  # fmt: skip
    card = ModelCard.from_folder(network.folder)
    if card.task == "semantic":
        if options.match_spectrum:
            require_spectrum(card, network.label)
        return _Whole(network, files, outputs, options, whole or WholeOptions(), report).run(
            where, dry_run=dry_run
        )
    of_whole = {
        "--picks": outputs.picks, "--figure": outputs.figure, "options of whole tomograms": whole,
        "--workers": where.workers > 1, "--cluster": where.cluster, "--dry-run": dry_run,
        f"outputs with {PLACEHOLDER} in their names": len(single) < len(given_paths),
    }  # fmt: skip
    given = [name for name, value in of_whole.items() if value]
    if given:
        msg = (
            f"{network.label} is for the task 'target': {', '.join(given)} need a semantic "
            "segmenter, such as cectflow-tomogram-segmenter@production"
        )
        raise ValueError(msg)
    return _outline(network, files, outputs, options, report)


def _outline(
    network: NetworkFiles,
    files: InputFiles,
    outputs: WholeOutputs,
    options: InputOptions,
    report: Report,
) -> Segmentation:
    """Particles at known positions, by a target segmenter."""
    loaded = open_once(network)
    if options.match_spectrum:
        require_spectrum(loaded.card, loaded.label)
    source = settle_spectrum(files.open(loaded.card, options, report), loaded.label, report)
    segment = segment_stack if files.tomogram is None else segment_tomogram
    outcome = segment(
        loaded, source, outputs.labels, outputs.probabilities, overwrite=options.overwrite
    )
    report(
        f"{outcome.num_particles} particles by {network.label}: {outcome.mean_voxels:.0f} voxels "
        f"on average, {outcome.num_empty} without any; written to {outputs.labels}"
    )
    return outcome


@dataclass(frozen=True)
class _Whole:
    """Whole tomograms, by a semantic segmenter."""

    network: NetworkFiles
    files: InputFiles
    outputs: WholeOutputs
    options: InputOptions
    whole: WholeOptions
    report: Report

    def run(
        self, where: Workplace, *, dry_run: bool
    ) -> WholeSegmentation | ManySegmentation | None:
        if self.files.tomogram is None or self.files.particles is not None:
            msg = (
                f"{self.network.label} is for the task 'semantic', which labels a whole tomogram "
                "by itself: give --tomogram alone; to outline known particles use --model "
                "cectflow-segmenter@production"
            )
            raise ValueError(msg)
        rules = self.whole.rules
        if self.outputs.picks is None and rules != PickRules(probability=rules.probability):
            msg = (
                "--min-volume, --max-volume, --nms-radius and --min-score choose among picks, "
                "which are not asked for: give --picks"
            )
            raise ValueError(msg)
        tomograms = self.files.whole_tomograms()
        named = [path for path in self.outputs.paths if path and PLACEHOLDER in path.name]
        if named or len(tomograms) > 1:
            return self._many(tomograms, where, dry_run=dry_run)
        if where != HERE or dry_run:
            msg = (
                f"--workers, --cluster and --dry-run are for many tomograms: put {PLACEHOLDER} "
                f"into the name of --out {self.outputs.labels}"
            )
            raise ValueError(msg)
        ((name, path),) = tomograms.items()
        return self._one(name, path)

    def _one(self, name: str, path: Path | str) -> WholeSegmentation:
        if isinstance(path, str):
            raise FileNotFoundError(path)
        outputs, options = self.outputs, self.options
        refuse_existing(outputs.paths, overwrite=options.overwrite, inputs=(path,))
        check_pick_name(name, outputs.picks)
        network = open_once(self.network)
        outcome = segment_whole(network, path, outputs, options, self.whole, self.report, name=name)
        shares, *picks = outcome.describe()
        self.report(f"{path} by {network.label}: {shares}; written to {outputs.labels}")
        for line in picks:
            self.report(f"{line}; {outputs.picks}")
        if outputs.figure is not None:
            self.report(f"slices: {outputs.figure}")
        return outcome

    def _many(
        self, tomograms: dict[str, Path | str], where: Workplace, *, dry_run: bool
    ) -> ManySegmentation | None:
        outputs, options, report = ManyOutputs(self.outputs), self.options, self.report
        out = self.outputs.labels
        tomograms = self._without_outputs(tomograms, outputs)
        volumes = [path for path in tomograms.values() if isinstance(path, Path)]
        refuse_existing(
            outputs.paths([*tomograms]), overwrite=options.overwrite,
            inputs=(*volumes, *self.files.volumes), begun=begun_outputs(out),
        )  # fmt: skip
        network = share_threads(self.network, where)
        outcome = segment_many(
            network, tomograms, outputs, options, self.whole, where=where, report=report,
            dry_run=dry_run,
        )  # fmt: skip
        if outcome is None:
            return None
        found = ""
        if outcome.num_picks is not None:
            named = ", ".join(f"{name} {count}" for name, count in outcome.num_picks.items())
            count = sum(outcome.num_picks.values())
            found = f": {count} particles{': ' if named else ''}{named}"
        number = len(outcome.shares)
        report(
            f"{number} tomogram{'s' if number > 1 else ''} by {network.label}{found}; "
            f"written to {out}"
        )
        if outcome.faults:
            report(
                f"{len(outcome.faults)} of {len(tomograms)} tomograms could not be segmented; "
                f"why: {outputs.failures}; the same command does them when they are mended"
            )
        return outcome

    def _without_outputs(
        self, tomograms: dict[str, Path | str], outputs: ManyOutputs
    ) -> dict[str, Path | str]:
        """Tomograms without the maps that an earlier call has written among them."""
        written = {
            path.absolute(): name for name in tomograms for path in outputs.of(name).paths if path
        }
        kept = {
            name: path
            for name, path in tomograms.items()
            if isinstance(path, str) or written.get(path.absolute(), name) == name
        }
        if len(kept) < len(tomograms):
            count = len(tomograms) - len(kept)
            self.report(f"{count} of {len(tomograms)} files are outputs of this command: left out")
        return kept
