"""Batch prediction from a model folder: subtomograms and tomograms in, STAR and label maps out."""
