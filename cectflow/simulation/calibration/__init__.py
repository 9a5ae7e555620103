"""A recipe fitted to real subtomograms: what their power tells of noise, tilts, defocus, SNR."""
