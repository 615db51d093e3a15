"""One page per stage of the report; `pipeline.py` runs them in order."""
