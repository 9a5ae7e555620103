"""The only modules that talk to MLflow: runs, the model registry, promotion policies."""
