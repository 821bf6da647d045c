"""The deep core: envelope, keys, scripts, worker loop, results. Knows no stage and no HTTP route."""
