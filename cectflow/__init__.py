"""cectflow: from atomic models to promoted networks and their predictions on cryo-ET data.

The package reads as one sentence: read structures, pack a scene, image it, extract
subtomograms, write a dataset, fit a network, distil a student, promote it, predict.
"""

__version__ = "0.1.0"
