"""One file is one stage; the backends a stage uses stand beside it."""
