# `conda activate NAME` of a job activates the virtual environment of $CECTFLOW_VENV instead.
conda() {
    . "${CECTFLOW_VENV:?set CECTFLOW_VENV to the virtual environment of cectflow}/bin/activate"
}
