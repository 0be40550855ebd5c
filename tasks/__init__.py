"""Tasks: one module per stage, one stage per artefact."""
