"""From atomic models to crowded, imaged, labelled subtomograms."""
